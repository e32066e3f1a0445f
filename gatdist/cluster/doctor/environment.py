"""Checks of a process's surroundings: temporary folder, limits, proxies, interfaces, GPUs.

Functions named ``assess_…`` are pure: they take what the others have measured.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from gatdist.cluster.doctor.report import Finding
from gatdist.cluster.network import VARIABLES, interfaces
from gatdist.common.errors import ClusterError, summary

_NEEDS_OPEN_FILES = 1024
_NEEDS_PROCESSES = 512  # including threads of Ray, torch and the reader
_NVIDIA_SMI_S = 10.0  # with a broken driver it may never end
_RAY_USES_PROXIES = "RAY_grpc_enable_http_proxy"
_CGROUP = Path("/sys/fs/cgroup")


def temporary_folder(*, for_ray: bool) -> Finding:
    """Check that the temporary folder takes files and sockets; Ray's sockets have longer paths."""
    try:
        from gatdist.cluster.connection import require_temporary_folder
    except ClusterError:  # Ray is not installed, which is a finding of its own
        pass
    else:
        try:
            require_temporary_folder(for_ray=for_ray)
        except ClusterError as error:
            message, _, hint = str(error).rstrip(".").rpartition(". ")
            return Finding("temporary folder", message, False, hint)
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        return assess_temporary_folder("", str(error.strerror), 0)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="gatdist-") as own,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            listener.bind(f"{own}/s")
    except OSError as error:
        return assess_temporary_folder(folder, error.strerror or str(error), 0)
    return assess_temporary_folder(folder, "", os.stat(folder).st_mode)


def assess_temporary_folder(folder: str, error: str, mode: int) -> Finding:
    """Assess a folder ("" for none), the error of making a socket in it, and its permissions."""
    name = "temporary folder"
    if error:
        hint = "Set TMPDIR to a short path of a writable local folder"
        return Finding(name, f"{folder or 'none'}: takes no sockets ({error})", False, hint)
    if mode & 0o002 and not mode & 0o1000:
        hint = f"chmod +t {folder}: other users can replace files there"
        return Finding(name, f"{folder}: writable by all without a sticky bit", None, hint)
    return Finding(name, folder, True)


def open_files() -> Finding:
    """Check the limit of open files."""
    return assess_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def assess_open_files(soft: int, hard: int) -> Finding:
    """Assess limits of open files; −1 is none."""
    ok = soft == resource.RLIM_INFINITY or soft >= _NEEDS_OPEN_FILES
    message = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    can_raise = hard == resource.RLIM_INFINITY or hard >= _NEEDS_OPEN_FILES
    where = "" if can_raise else ", as root or in /etc/security/limits.conf"
    hint = "" if ok else f"ulimit -n {max(_NEEDS_OPEN_FILES, hard)}{where}"
    return Finding("open files", message, ok, hint)


def processes() -> Finding:
    """Check the limits of processes and threads of this user and this container."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft
    most, now = _number(_CGROUP / "pids.max"), _number(_CGROUP / "pids.current")
    return assess_processes(user, None if most is None else most - (now or 0))


def assess_processes(user: int | None, container: int | None) -> Finding:
    """Assess how many processes a user may have, and how many a container may add."""
    known = [limit for limit in (user, container) if limit is not None]
    if not known:
        return Finding("processes", "no limit", True)
    ok = min(known) >= _NEEDS_PROCESSES
    hint = "" if ok else "Raise ulimit -u, or the container's limit (docker run --pids-limit=-1)"
    return Finding("processes", f"{min(known):,}", ok, hint)


def cgroup_memory() -> tuple[int, int] | None:
    """Return free bytes and the limit of this container; None without a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = _number(_CGROUP / limit), _number(_CGROUP / usage)
        if most is not None and now is not None and most < 2**60:
            return max(0, most - now), most
    return None


def _number(path: Path) -> int | None:
    """Return the number in a file; None if it is absent or says ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def assess_proxies(environment: Mapping[str, str], addresses: Sequence[str]) -> Finding:
    """Assess whether a process bypasses proxies for the cluster's addresses and loopback."""
    found = [
        name
        for name in sorted(environment)
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        and environment[name]
    ]
    if not found:
        return Finding("proxies", "none", True)
    named = ", ".join(found)
    missed = {one for one in ("127.0.0.1", *addresses) if not _is_bypassed(environment, one)}
    if not missed:
        return Finding("proxies", f"{named}; not for the cluster (no_proxy)", True)
    message = f"{named}: no_proxy lacks {', '.join(sorted(missed))}"
    hint = f"Add {','.join(sorted(missed))} to no_proxy and NO_PROXY where Ray is started"
    # By default, Ray's own connections bypass proxies; storage and `ray job` use them.
    is_used = environment.get(_RAY_USES_PROXIES, "").lower() in ("1", "true")
    return Finding("proxies", message, False if is_used else None, hint)


def _is_bypassed(environment: Mapping[str, str], address: str) -> bool:
    """Whether ``no_proxy`` has an address, a network of it (10.0.0.0/8) or ``*``."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    for each in (part.strip() for part in listed.split(",")):
        try:
            if "/" in each and ipaddress.ip_address(address) in ipaddress.ip_network(each, False):
                return True
        except ValueError:
            continue
    return bool(proxy_bypass_environment(address, {"no": listed}))


def chosen_interfaces() -> Finding:
    """Check that the network interfaces chosen by environment variables exist."""
    chosen = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return assess_chosen_interfaces(chosen, list(interfaces()))


def assess_chosen_interfaces(chosen: Mapping[str, str], present: Sequence[str]) -> Finding:
    """Assess the interfaces chosen by each variable, given those that have an address.

    NCCL's values may begin with ^ (all but) or = (exactly); else they are prefixes of names.
    """
    wrong = []
    for variable, value in chosen.items():
        names = [name.strip() for name in value.lstrip("=").split(",")]
        by_prefix = variable.startswith("NCCL") and not value.startswith("=")
        if variable.startswith("NCCL") and value.startswith("^"):
            continue
        wrong += [
            f"{variable} = {value}: no interface {name}"
            for name in names
            if name not in present and not (by_prefix and any(p.startswith(name) for p in present))
        ]
    message = "; ".join(wrong) or ", ".join(f"{k}={v}" for k, v in chosen.items()) or "automatic"
    hint = f"Unset it, or choose one of {', '.join(present)}" if wrong else ""
    return Finding("chosen interface", message, not wrong, hint)


class Gpu(NamedTuple):
    """A GPU as nvidia-smi reports it; unknown fields are ""."""

    number: str
    name: str
    driver: str
    memory_mb: str  # MiB, as used_mb
    used_mb: str
    compute_mode: str  # Default, Exclusive_Process or Prohibited
    mig: str  # Enabled if it is split into instances
    ecc_errors: str  # uncorrected ones since the driver was loaded


# Of nvidia-smi, in the order of the fields above.
_GPU_FIELDS = (
    *("index", "name", "driver_version", "memory.total", "memory.used"),
    *("compute_mode", "mig.mode.current", "ecc.errors.uncorrected.volatile.total"),
)


def nvidia_gpus() -> list[Gpu]:
    """Return what nvidia-smi reports; [] if it fails."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_S
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parsed_gpus(answer.stdout)


def parsed_gpus(answer: str) -> list[Gpu]:
    """Parse lines of nvidia-smi; other lines are skipped."""
    found = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_GPU_FIELDS) and fields[0].isdecimal():
            found.append(Gpu(*("" if field.startswith("[") else field for field in fields)))
    return found


def tried_devices(
    num_devices: int, attempt: Callable[[int], object] | None = None
) -> dict[int, str]:
    """Compute on each GPU (by default with torch). Returns the errors by number."""
    failed = {}
    for number in range(num_devices):
        try:
            (attempt or _use)(number)
        except (RuntimeError, AssertionError) as error:
            failed[number] = summary(error)
    return failed


def _use(number: int) -> None:
    import torch

    square = torch.ones(256, 256, device=f"cuda:{number}")
    if float((square @ square).sum()) != 256.0**3:
        raise RuntimeError("a product of matrices is wrong")


def assess_gpus(
    gpus: Sequence[Gpu], num_visible: int, failed: Mapping[int, str], num_ray: float | None = None
) -> list[Finding]:
    """Return what is wrong with a host's GPUs; ``failed`` is of :func:`tried_devices`.

    nvidia-smi sees all, torch those that are visible to this process, Ray those it gives to workers
    (None without a cluster).
    """
    found = [
        Finding(f"GPU {number}", f"fails its first operation ({why})", False, "Check nvidia-smi")
        for number, why in failed.items()
    ]
    if num_ray is not None and num_ray > num_visible:
        message = f"Ray has {num_ray:g}, and torch sees {num_visible}"
        hint = "Check nvidia-smi and CUDA_VISIBLE_DEVICES, and start Ray there with --num-gpus"
        found.append(Finding("GPUs", message, False, hint))
    for gpu in gpus:
        name = f"GPU {gpu.number} ({gpu.name})"
        if gpu.compute_mode == "Prohibited":
            hint = f"nvidia-smi -i {gpu.number} -c DEFAULT"
            found.append(Finding(name, "compute mode Prohibited", False, hint))
        if gpu.ecc_errors.isdecimal() and int(gpu.ecc_errors):
            message = f"{gpu.ecc_errors} uncorrected memory errors"
            found.append(Finding(name, message, False, "Reset the GPU, or take the host out"))
        if gpu.mig == "Enabled":
            hint = "Workers get instances of it; disable MIG to train on all of it"
            found.append(Finding(name, "split into MIG instances", None, hint))
        if gpu.used_mb.isdecimal() and gpu.memory_mb.isdecimal():
            used, total = int(gpu.used_mb), int(gpu.memory_mb)
            if used > total / 2:
                message = f"{used:,} of {total:,} MiB are in use"
                found.append(Finding(name, message, None, "End other programs that use it"))
    return found
