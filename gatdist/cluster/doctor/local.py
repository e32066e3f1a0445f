"""Looks at the machine that it runs on. Works without Ray, and imports nothing heavy at first.

The functions that look are thin; those that take numbers say what is enough.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gatdist.cluster.doctor.report import Finding, Report
from gatdist.cluster.network import interface_of
from gatdist.config import cache_folder
from gatdist.version import __version__

_GB = 10**9
_NEEDS_DISK_BYTES = 2 * _GB
_NEEDS_MEMORY_BYTES = 2 * _GB
_NEEDS_SHARED_MEMORY_BYTES = 10**8  # what our Ray's object store takes
_NEEDS_RAY = (2, 60)
_NVIDIA_SMI_S = 10.0  # with a broken driver it may never end


def examine(storage_url: str = "", options: Mapping[str, Any] | None = None) -> Report:
    """Look at this machine, and at storage as it is reached from here.

    Args:
        storage_url: of a folder to be tried; "" for none.
        options: of its storage.

    Raises:
        StorageError: nothing can be written to the storage.
        StorageUnavailableError: it does not answer.
    """
    findings = look(_outward_address(), {"here": Path.cwd()})
    if storage_url:
        # With fsspec, which takes a moment to import.
        from gatdist.cluster.doctor import storage
        from gatdist.storage import absolute

        with storage.token(absolute(storage_url), options or {}) as token:
            findings.append(storage.judge(storage.look(token), storage.shown(token)))
    return Report(findings)


def look(address: str, folders: Mapping[str, Path]) -> list[Finding]:
    """Software, device, network, cores, memory and disk of this machine.

    Args:
        address: by which other hosts reach it.
        folders: that need room on a disk, by name; the cache is added.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _ray,
        lambda: Finding("gatdist", __version__, True),
        _device,
        lambda: _interface(address),
        _cores,
        _memory,
        _shared_memory,
    ]
    disks = {**folders, "cache": cache_folder()}
    return [check() for check in checks] + [_disk(*disk) for disk in disks.items()]


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

        from gatdist.cluster.welcome import device_error
    except ImportError:
        return Finding("device", "unknown without torch", None)
    if not torch.cuda.is_available():
        return judge_device("", Path("/dev/nvidia0").exists(), "")
    memory = torch.cuda.get_device_properties(0).total_memory
    names = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory / _GB:.0f} GB"
    return judge_device(f"{names}, driver {_driver()}", True, device_error())


def judge_device(usable: str, present: bool, error: str) -> Finding:
    """The verdict.

    Args:
        usable: the GPUs that torch sees, in words; "".
        present: whether the machine has one.
        error: what its first operation failed with; "".
    """
    if error:
        told = f"the GPU fails its first operation ({error}): {usable}"
        return Finding("device", told, False, "Check nvidia-smi")
    if usable:
        return Finding("device", usable, True)
    if present:
        mend = "Install the CUDA build of torch, or a driver that fits it"
        return Finding("device", "CPU (though a GPU is there)", False, mend)
    return Finding("device", "CPU (GPU: none)", True)


def _driver() -> str:
    """Version of the GPU's driver."""
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_S
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.partition("\n")[0].strip()


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
    ok = tuple(map(int, version.split(".")[:2])) >= _NEEDS_RAY
    return Finding("Ray", version, ok, "" if ok else "pip install 'ray[default,train]>=2.60'")


def _interface(address: str) -> Finding:
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = "nothing"
    return judge_interface(interface_of(address), address, resolved)


def judge_interface(name: str | None, address: str, resolved: str) -> Finding:
    """The verdict on the interface by which other hosts reach this one.

    Args:
        name: of the interface that carries ``address``; None if there is none.
        address: by which they reach it.
        resolved: what this host's own name leads to.
    """
    if name is None:
        mend = f"Start Ray with --node-ip-address=… of this host, not {address}"
        return Finding("interface", f"none carries {address}", False, mend)
    if address.startswith("127."):
        mend = "Fine on one machine; hosts can't reach this one"
        return Finding("interface", f"{name} ({address}): loopback only", None, mend)
    same = resolved == address
    note = "" if same else f"; the host's name leads to {resolved}, which is not used"
    return Finding("interface", f"{name} ({address}{note})", True)


def _outward_address() -> str:
    """Of the interface that leads elsewhere; that of loopback if there is none."""
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
    return judge_memory(amounts["MemAvailable"], amounts["MemTotal"])


def judge_memory(free_bytes: int, total_bytes: int) -> Finding:
    """Whether memory is enough."""
    ok = free_bytes >= _NEEDS_MEMORY_BYTES
    mend = "" if ok else f"End other programs: less than {_NEEDS_MEMORY_BYTES / _GB:.0f} GB is free"
    value = f"{free_bytes / _GB:.1f} GB free of {total_bytes / _GB:.1f} GB"
    return Finding("memory", value, ok, mend)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    return judge_shared_memory(shutil.disk_usage(folder).free if folder.exists() else None)


def judge_shared_memory(free_bytes: int | None) -> Finding:
    """Whether ``/dev/shm`` is enough; None where there is none."""
    if free_bytes is None:
        return Finding("/dev/shm", "absent", False, "Mount a tmpfs there; Ray needs it")
    ok = free_bytes >= _NEEDS_SHARED_MEMORY_BYTES
    mend = "" if ok else "Enlarge it (docker run --shm-size=1g)"
    return Finding("/dev/shm", f"{free_bytes / _GB:.2f} GB free", ok, mend)


def _disk(name: str, folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
    return judge_disk(f"disk ({name})", str(existing), free, writable)


def judge_disk(name: str, folder: str, free_bytes: int, writable: bool) -> Finding:
    """Whether a folder has room and takes files."""
    if not writable:
        mend = "Give yourself the right to write there"
        return Finding(name, f"{folder} can't be written", False, mend)
    ok = free_bytes >= _NEEDS_DISK_BYTES
    mend = "" if ok else f"Make room: less than {_NEEDS_DISK_BYTES / _GB:.0f} GB is free"
    return Finding(name, f"{free_bytes / _GB:.1f} GB free in {folder}", ok, mend)
