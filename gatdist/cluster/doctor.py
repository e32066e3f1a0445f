"""Checks this machine before anybody trains on it.

Works without Ray and imports nothing heavy at first.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gatdist.cluster.network import interfaces
from gatdist.config import cache_folder

_GB = 10**9
_NEEDS_DISK_BYTES = 2 * _GB
_NEEDS_MEMORY_BYTES = 2 * _GB
_NEEDS_SHARED_MEMORY_BYTES = 10**8  # what our Ray's object store takes


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: what.
        value: what was found, for people.
        ok: whether training can go on with it; None where that depends.
        mend: what to do about it; "" where there is nothing to do.
    """

    name: str
    value: str
    ok: bool | None
    mend: str = ""


def examine() -> list[Finding]:
    """Look at this machine's software, device, network, cores, memory and disk."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _device,
        _ray,
        _network,
        _cores,
        _memory,
        _shared_memory,
        lambda: _disk("disk (here)", Path.cwd()),
        lambda: _disk("disk (cache)", cache_folder()),
    ]
    return [check() for check in checks]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", platform.python_version(), ok, "" if ok else "Install Python 3.11")


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", f"can't be imported ({error})", False, "pip install torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", f"{torch.__version__} ({build})", True)


def _device() -> Finding:
    """The device that training would use, tried with one operation."""
    try:
        import torch
    except ImportError:
        return Finding("device", "unknown without torch", None)
    if not torch.cuda.is_available():
        seen = Path("/dev/nvidia0").exists()
        mend = "Install the CUDA build of torch, or a driver that fits it" if seen else ""
        return Finding(
            "device", "CPU" + (" (though a GPU is there)" if seen else ""), not seen, mend
        )
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return Finding(
            "device", f"the GPU fails its first operation ({error})", False, "Check nvidia-smi"
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    value = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory / _GB:.0f} GB"
    return Finding("device", value, True)


def _ray() -> Finding:
    if importlib.util.find_spec("ray") is None:
        return Finding(
            "Ray", "not installed: only --local works", None, "pip install 'ray[default,train]'"
        )
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "Ray", "broken: it has no version", False, "pip install 'ray[default,train]'"
        )
    ok = tuple(map(int, version.split(".")[:2])) >= (2, 60)
    return Finding("Ray", version, ok, "" if ok else "pip install 'ray[default,train]>=2.60'")


def _network() -> Finding:
    """The interface that leads elsewhere, which workers on other hosts would be reached by."""
    found = interfaces()
    address = _outward_address()
    name = next((n for n, own in found.items() if own == address), None)
    if name is None:
        return Finding(
            "interface", "loopback only", None, "Fine on one machine; hosts can't reach this one"
        )
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = "nothing"
    note = (
        "" if resolved == address else f"; the host's name leads to {resolved}, which is not used"
    )
    return Finding("interface", f"{name} ({address}{note})", True)


def _outward_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a UDP socket sends nothing; it only asks the routing table. The address is
            # one that is reserved for documentation.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    return Finding("cores", f"{usable} usable of {os.cpu_count()}", True)


def _memory() -> Finding:
    amounts = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        amounts[name] = int(rest.split()[0]) * 1024
    free, total = amounts["MemAvailable"], amounts["MemTotal"]
    ok = free >= _NEEDS_MEMORY_BYTES
    mend = "" if ok else f"End other programs: less than {_NEEDS_MEMORY_BYTES / _GB:.0f} GB is free"
    return Finding("memory", f"{free / _GB:.1f} GB free of {total / _GB:.1f} GB", ok, mend)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Finding("/dev/shm", "absent", False, "Mount a tmpfs there; Ray needs it")
    free = shutil.disk_usage(folder).free
    ok = free >= _NEEDS_SHARED_MEMORY_BYTES
    return Finding(
        "/dev/shm",
        f"{free / _GB:.2f} GB free",
        ok,
        "" if ok else "Enlarge it (docker run --shm-size=1g)",
    )


def _disk(name: str, folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return Finding(
            name, f"{existing} can't be written", False, "Give yourself the right to write there"
        )
    ok = free >= _NEEDS_DISK_BYTES
    mend = "" if ok else f"Make room: less than {_NEEDS_DISK_BYTES / _GB:.0f} GB is free"
    return Finding(name, f"{free / _GB:.1f} GB free in {existing}", ok, mend)
