"""What surrounds a process on a host: its temporary folder, limits, proxies and GPUs.

The functions that look are thin; those named ``judge_…`` take what was seen, and look at nothing.
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
_NEEDS_PROCESSES = 512  # threads count, too: those of Ray, torch and the reader
_NVIDIA_SMI_S = 10.0  # with a broken driver it may never end
_GPU_FIELDS = (
    *("index", "name", "driver_version", "memory.total", "memory.used"),
    *("compute_mode", "mig.mode.current", "ecc.errors.uncorrected.volatile.total"),
)
_RAY_USES_PROXIES = "RAY_grpc_enable_http_proxy"
_CGROUP = Path("/sys/fs/cgroup")


def temporary_folder(*, for_ray: bool) -> Finding:
    """Whether the temporary folder takes files and sockets.

    Args:
        for_ray: whether a Ray is to be started in it, whose sockets have longer paths.
    """
    try:
        from gatdist.cluster.connection import require_temporary_folder
    except ClusterError:  # Ray is not installed, and a finding of its own says so
        pass
    else:
        try:
            require_temporary_folder(for_ray=for_ray)
        except ClusterError as error:
            message, _, hint = str(error).rstrip(".").rpartition(". ")
            return Finding("temporary folder", message, False, hint)
    return judge_temporary_folder(*_tried_temporary_folder())


def _tried_temporary_folder() -> tuple[str, str, int]:
    """The folder, why no socket can be made in it ("" if it can), and its permissions."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        return "", str(error.strerror), 0
    try:
        with (
            tempfile.TemporaryDirectory(prefix="gatdist-") as own,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            listener.bind(f"{own}/s")
    except OSError as error:
        return folder, error.strerror or str(error), 0
    return folder, "", os.stat(folder).st_mode


def judge_temporary_folder(folder: str, error: str, mode: int) -> Finding:
    """The verdict.

    Args:
        folder: its path; "" where there is none.
        error: why no file or socket can be made in it; "".
        mode: its permissions.
    """
    name = "temporary folder"
    if error:
        hint = "Set TMPDIR to a short path of a local folder that you can write"
        return Finding(name, f"{folder or 'none'}: takes no sockets ({error})", False, hint)
    if mode & 0o002 and not mode & 0o1000:
        hint = f"chmod +t {folder}: other users can replace files there"
        return Finding(name, f"{folder}: writable by all without a sticky bit", None, hint)
    return Finding(name, folder, True)


def open_files() -> Finding:
    """Whether this process may open enough files."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Finding:
    """The verdict on limits of open files; −1 is none."""
    ok = soft == resource.RLIM_INFINITY or soft >= _NEEDS_OPEN_FILES
    message = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    can_raise = hard == resource.RLIM_INFINITY or hard >= _NEEDS_OPEN_FILES
    where = "" if can_raise else ", as root or in /etc/security/limits.conf"
    hint = "" if ok else f"ulimit -n {max(_NEEDS_OPEN_FILES, hard)}{where}"
    return Finding("open files", message, ok, hint)


def processes() -> Finding:
    """Whether this user, and this container, may have enough processes and threads."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft
    most, now = _number(_CGROUP / "pids.max"), _number(_CGROUP / "pids.current")
    return judge_processes(user, None if most is None else most - (now or 0))


def judge_processes(user: int | None, container: int | None) -> Finding:
    """The verdict on how many processes and threads a user may have, and a container may add."""
    known = [limit for limit in (user, container) if limit is not None]
    if not known:
        return Finding("processes", "no limit", True)
    ok = min(known) >= _NEEDS_PROCESSES
    hint = "" if ok else "Raise ulimit -u, or the container's limit (docker run --pids-limit=-1)"
    return Finding("processes", f"{min(known):,}", ok, hint)


def cgroup_memory() -> tuple[int, int] | None:
    """Bytes free and the most of this container; None where it has no limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = _number(_CGROUP / limit), _number(_CGROUP / usage)
        if most is not None and now is not None and most < 2**60:
            return max(0, most - now), most
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or the word ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def proxies(addresses: Sequence[str]) -> Finding:
    """Whether proxies in the environment are kept from hosts at these addresses."""
    return judge_proxies(os.environ, addresses)


def judge_proxies(environment: Mapping[str, str], addresses: Sequence[str]) -> Finding:
    """The verdict on a process's environment.

    Args:
        environment: of the process.
        addresses: of the hosts of the cluster; loopback is added.
    """
    found = {
        name: environment[name]
        for name in sorted(environment)
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        and environment[name]
    }
    if not found:
        return Finding("proxies", "none", True)
    named = ", ".join(found)
    missed = {one for one in ("127.0.0.1", *addresses) if not _is_bypassed(environment, one)}
    if not missed:
        return Finding("proxies", f"{named}; not for the cluster (no_proxy)", True)
    message = f"{named}: no_proxy lacks {', '.join(sorted(missed))}"
    hint = f"Add {','.join(sorted(missed))} to no_proxy and NO_PROXY where Ray is started"
    # By default, Ray keeps its own connections from proxies; storage and `ray job` do not.
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
    """Whether the interfaces that the environment chooses for process groups exist."""
    chosen = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return judge_chosen_interfaces(chosen, list(interfaces()))


def judge_chosen_interfaces(chosen: Mapping[str, str], present: Sequence[str]) -> Finding:
    """The verdict.

    Args:
        chosen: interfaces by variable; NCCL's may begin with ^ (all but) or = (exactly), and its
            names are beginnings of names.
        present: names of interfaces that have an address.
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
    message = "; ".join(wrong) or ", ".join(f"{k}={v}" for k, v in chosen.items()) or "chosen by us"
    hint = f"Unset it, or choose one of {', '.join(present)}" if wrong else ""
    return Finding("chosen interface", message, not wrong, hint)


class Gpu(NamedTuple):
    """A GPU as nvidia-smi sees it; fields that it does not tell are "".

    Attributes:
        number: as nvidia-smi counts.
        name: of the product.
        driver: version of the driver.
        memory_mb: of the GPU, in MiB.
        used_mb: of that in use.
        compute_mode: ``Default``, ``Exclusive_Process`` or ``Prohibited``.
        mig: ``Enabled`` where it is split into instances.
        ecc_errors: uncorrected errors of its memory since the driver was loaded.
    """

    number: str
    name: str
    driver: str
    memory_mb: str
    used_mb: str
    compute_mode: str
    mig: str
    ecc_errors: str


def nvidia_gpus() -> list[Gpu]:
    """What nvidia-smi tells; [] where it tells nothing."""
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
    """Lines of nvidia-smi; those of another form are skipped."""
    found = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(_GPU_FIELDS) and fields[0].isdecimal():
            found.append(Gpu(*("" if field.startswith("[") else field for field in fields)))
    return found


def tried_devices(
    num_devices: int, attempt: Callable[[int], object] | None = None
) -> dict[int, str]:
    """Why local ranks can't use the GPU of their number; {} where all can.

    Args:
        num_devices: that torch sees.
        attempt: allocates on the device of a number and computes there; by default on CUDA.
    """
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


def judge_gpus(
    gpus: Sequence[Gpu], num_visible: int, failed: Mapping[int, str], num_ray: float | None = None
) -> list[Finding]:
    """The verdict on a host's GPUs; [] where there are none.

    Args:
        gpus: that nvidia-smi tells of, including those hidden from this process.
        num_visible: that torch sees.
        failed: see :func:`tried_devices`.
        num_ray: that Ray would give to workers; None without a cluster.
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
