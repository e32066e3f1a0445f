"""Checks this machine. Works without Ray, and imports torch only in the checks that need it.

Functions named ``assess_…`` are pure: they take what the others have measured.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gatdist.cluster.doctor import environment
from gatdist.cluster.doctor.report import Finding, Report
from gatdist.cluster.network import address_towards, interface_of
from gatdist.common.cores import CORES_NEEDED, decode_threads, usable_cores
from gatdist.common.version import __version__
from gatdist.config import cache_folder
from gatdist.monitor.numbers import plural

_GB = 10**9
_NEEDS_DISK_BYTES = 2 * _GB
_NEEDS_MEMORY_BYTES = 2 * _GB
_NEEDS_SHARED_MEMORY_BYTES = 10**8  # of the object store of a Ray that is started here
_NEEDS_RAY = (2, 60)
_NEEDS_FILES = 10_000  # inodes


def examine(storage_url: str = "", options: Mapping[str, Any] | None = None) -> Report:
    """Check this machine, and the storage at ``storage_url`` ("" for none) from here.

    Raises:
        StorageError: the storage is not writable.
        StorageUnavailableError: the storage does not answer.
    """
    # Of the default route; the host is one reserved for documentation.
    address = address_towards("192.0.2.1") or "127.0.0.1"
    folders = {"here": Path.cwd()}
    if storage_url and "://" not in storage_url:
        folders["run"] = Path(storage_url).expanduser().absolute()
    findings = look(address, folders, for_ray=True)
    findings.append(environment.assess_proxies(os.environ, [address]))
    if storage_url:
        # With fsspec, which takes a moment to import.
        from gatdist.cluster.doctor import storage
        from gatdist.storage.urls import absolute

        with storage.marker(absolute(storage_url), options or {}) as marker:
            findings.append(storage.assess(storage.look(marker), marker.store().url))
    return Report(findings)


def look(
    address: str,
    folders: Mapping[str, Path],
    *,
    for_ray: bool = False,
    num_ray_gpus: float | None = None,
) -> list[Finding]:
    """Check software, devices, network, cores, memory, limits and disks of this machine.

    Args:
        address: By which other hosts reach it.
        folders: Folders that need disk space, by name, besides the cache and the temporary folder.
        for_ray: Whether training would start Ray here.
        num_ray_gpus: Number of GPUs that the host's Ray gives to workers; None without a Ray.
    """
    disks = {**folders, "cache": cache_folder()}
    with suppress(FileNotFoundError):  # a finding of its own says so
        disks["temporary"] = Path(tempfile.gettempdir())
    return [
        _python(),
        _torch(),
        _ray(),
        Finding("gatdist", __version__, True),
        _device(),
        _interface(address),
        environment.chosen_interfaces(),
        _cores(),
        _memory(),
        _shared_memory(),
        environment.temporary_folder(for_ray=for_ray),
        environment.open_files(),
        environment.processes(),
        *_gpus(num_ray_gpus),
        *(_disk(name, folder) for name, folder in disks.items()),
    ]


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("Python", platform.python_version(), ok, "" if ok else "Install Python 3.11")


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", f"can't be imported ({error})", False, "pip install torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if not torch.distributed.is_available():
        message = f"{torch.__version__} ({build}) without torch.distributed"
        return Finding("torch", message, False, "Install a build of torch with torch.distributed")
    return Finding("torch", f"{torch.__version__} ({build})", True)


def _device() -> Finding:
    """Try one operation on the device that training would use."""
    try:
        import torch

        from gatdist.cluster.preflight import device_error
    except ImportError:
        return Finding("device", "unknown without torch", None)
    if not torch.cuda.is_available():
        return assess_device("", Path("/dev/nvidia0").exists(), "")
    memory = torch.cuda.get_device_properties(0).total_memory
    names = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}, {memory / _GB:.0f} GB"
    driver = next((gpu.driver for gpu in environment.nvidia_gpus()), "unknown")
    return assess_device(f"{names}, driver {driver}", True, device_error())


def assess_device(usable: str, present: bool, error: str) -> Finding:
    """Assess the GPUs that torch sees, whether the machine has one, and the error of using it."""
    if error:
        message = f"the GPU fails its first operation ({error}): {usable}"
        return Finding("device", message, False, "Check nvidia-smi")
    if usable:
        return Finding("device", usable, True)
    if present:
        hint = "Install the CUDA build of torch, or a driver that fits it"
        return Finding("device", "CPU (though a GPU is there)", False, hint)
    return Finding("device", "CPU (GPU: none)", True)


def _cores() -> Finding:
    try:
        import torch
    except ImportError:
        return assess_cores(usable_cores(), os.cpu_count() or 1, 0)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return assess_cores(usable_cores(), os.cpu_count() or 1, gpus)


def assess_cores(usable: int, present: int, gpus: int) -> Finding:
    """Assess the cores that this process may use, for a worker on each GPU."""
    found = f"{usable} usable of {present}"
    if not gpus:
        return Finding("cores", found, True)
    threads = decode_threads(usable / gpus)
    message = f"{found}, for {plural(threads, 'decoding thread')} per GPU"
    if usable >= CORES_NEEDED * gpus:
        return Finding("cores", message, True)
    hint = "Give this host or container 2 cores per GPU or more; see docs/how-to/gpus.md"
    return Finding("cores", message, None, hint)


def _gpus(num_ray: float | None) -> list[Finding]:
    """Try each GPU as the worker with its local rank would."""
    try:
        import torch
    except ImportError:
        return []
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    failed = environment.tried_devices(visible)
    return environment.assess_gpus(environment.nvidia_gpus(), visible, failed, num_ray)


def _ray() -> Finding:
    install = "pip install 'ray[default,train]'"
    if importlib.util.find_spec("ray") is None:
        return Finding("Ray", "not installed: only --local works", None, install)
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Ray", "broken: it has no version", False, install)
    ok = tuple(map(int, version.split(".")[:2])) >= _NEEDS_RAY
    return Finding("Ray", version, ok, "" if ok else "pip install 'ray[default,train]>=2.60'")


def _interface(address: str) -> Finding:
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = "nothing"
    return assess_interface(interface_of(address), address, resolved)


def assess_interface(name: str | None, address: str, resolved: str) -> Finding:
    """Assess the interface (None for none) that carries the address by which hosts reach this one.

    ``resolved`` is the address of this host's own name.
    """
    if name is None:
        hint = f"Start Ray with --node-ip-address=… of this host, not {address}"
        return Finding("interface", f"none carries {address}", False, hint)
    if address.startswith("127."):
        hint = "Fine on one machine; other hosts can't reach this one"
        return Finding("interface", f"{name} ({address}): loopback only", None, hint)
    same = resolved == address
    note = "" if same else f"; the host's name leads to {resolved}, which is not used"
    return Finding("interface", f"{name} ({address}{note})", True)


def _memory() -> Finding:
    amounts = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        amounts[name] = int(rest.split()[0]) * 1024
    host = amounts["MemAvailable"], amounts["MemTotal"]
    return assess_memory(*min(host, environment.cgroup_memory() or host))


def assess_memory(free_bytes: int, total_bytes: int) -> Finding:
    """Assess the memory of this machine or container."""
    ok = free_bytes >= _NEEDS_MEMORY_BYTES
    hint = "" if ok else f"End other programs: less than {_NEEDS_MEMORY_BYTES / _GB:.0f} GB is free"
    value = f"{free_bytes / _GB:.1f} GB free of {total_bytes / _GB:.1f} GB"
    return Finding("memory", value, ok, hint)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return assess_shared_memory(None)
    return assess_shared_memory(shutil.disk_usage(folder).free, _write_error(folder))


def assess_shared_memory(free_bytes: int | None, error: str = "") -> Finding:
    """Assess ``/dev/shm`` (None if absent), and the error of making a file there."""
    if free_bytes is None:
        return Finding("/dev/shm", "absent", False, "Mount a tmpfs there; Ray needs it")
    if error and free_bytes >= _NEEDS_SHARED_MEMORY_BYTES:
        return Finding("/dev/shm", f"takes no files ({error})", False, "chmod 1777 /dev/shm")
    ok = free_bytes >= _NEEDS_SHARED_MEMORY_BYTES
    hint = "" if ok else "Enlarge it (docker run --shm-size=1g)"
    return Finding("/dev/shm", f"{free_bytes / _GB:.2f} GB free", ok, hint)


def _write_error(folder: Path) -> str:
    """Return the error of making a file in a folder; "" if it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _disk(name: str, folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        return assess_disk(f"disk ({name})", str(folder), 0, False)
    disk, usage = os.statvfs(existing), shutil.disk_usage(existing)
    files = disk.f_favail if disk.f_files else None  # some file systems do not count them
    writable = not _write_error(existing) or usage.free < _NEEDS_DISK_BYTES
    return assess_disk(f"disk ({name})", str(existing), usage.free, writable, files)


def assess_disk(
    name: str, folder: str, free_bytes: int, writable: bool, free_files: int | None = None
) -> Finding:
    """Assess a folder's permissions, and free bytes and inodes (None if unlimited) of its disk."""
    if not writable:
        hint = "Give yourself the right to write there"
        return Finding(name, f"{folder} is not writable", False, hint)
    if free_files is not None and free_files < _NEEDS_FILES:
        return Finding(name, f"{free_files:,} more files in {folder}", False, "Delete small files")
    ok = free_bytes >= _NEEDS_DISK_BYTES
    hint = "" if ok else f"Make room: less than {_NEEDS_DISK_BYTES / _GB:.0f} GB is free"
    return Finding(name, f"{free_bytes / _GB:.1f} GB free in {folder}", ok, hint)
