"""Preflight checks on each worker's host: versions, device, storage and clock."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from gatdist.common.errors import ClusterError, GatdistError
from gatdist.common.version import __version__
from gatdist.storage import Store

if TYPE_CHECKING:
    import torch

# Object stores refuse requests whose clock is 15 minutes off.
MAX_CLOCK_S = 300.0
_PREFIX = "launching-"
_MOST_NAMES = 4


class HostInfo(NamedTuple):
    """What a worker reports of its host."""

    host: str
    address: str
    versions: dict[str, str]  # of what must be identical on all hosts
    clock_s: float  # since the epoch
    device: str  # error of its first operation, or ""
    storage: str  # error of using the run directory, or ""
    gpu: str = ""  # model, memory and compute capability


class Fault(NamedTuple):
    """Why a host can't train with the others."""

    host: HostInfo
    about: str  # versions, device, storage or clock
    rule: str
    hint: str


class Marker(NamedTuple):
    """A file, whose content is its name, that all hosts must see in the folder at ``url``."""

    url: str
    options: dict[str, Any]
    name: str

    def store(self, **limits: float) -> Store:
        """Return the folder."""
        return Store(self.url, self.options, **limits)


@contextmanager
def marker(
    url: str, options: Mapping[str, Any], prefix: str = _PREFIX, **limits: float
) -> Iterator[Marker]:
    """Leave a file in the folder at ``url`` for a while. For the limits see ``Store``.

    Raises:
        StorageError: the folder is not writable.
    """
    found = Marker(url, dict(options), f"{prefix}{uuid.uuid4().hex}")
    store = found.store(**limits)
    if prefix == _PREFIX:
        with suppress(GatdistError):  # left by drivers that were killed
            store.delete_files(left for left in store.list() if left.startswith(_PREFIX))
    store.publish(found.name, found.name.encode())
    try:
        yield found
    finally:
        with suppress(GatdistError):
            store.delete_files([found.name])


def host_info(address: str, expected: Marker, device: torch.device | None) -> HostInfo:
    """Examine this worker's host, whose address is ``address``, and its GPU, if it has one."""
    from gatdist.parallel.places import Device

    error = device_error(device) if device else ""
    gpu = Device.of(device).model if device and not error else ""
    storage = storage_error(expected, retry_budget_s=10.0, stall_s=30.0)
    return HostInfo(socket.gethostname(), address, versions(), time.time(), error, storage, gpu)


def versions() -> dict[str, str]:
    """Return the versions that must be identical on all hosts."""
    import torch

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "Ray": _version("ray"),
        "gatdist": __version__,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_error(device: torch.device | str = "cuda") -> str:
    """Return the first line of the error of an operation on a device; "" if it succeeds."""
    import torch

    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def storage_error(expected: Marker, **limits: float) -> str:
    """Return why a marker is not readable from here; "" if it is. For the limits see ``Store``."""
    try:
        store = expected.store(**limits)
        if store.read_if_exists(expected.name) == expected.name.encode():
            return ""
        return f"{store.url} is another folder there"
    except GatdistError as error:
        return str(error)


def faults(found: Sequence[HostInfo], now_s: float) -> list[Fault]:
    """Return what is wrong, host by host. Versions are compared with the most common ones.

    ``now_s`` is the driver's clock when they were examined, in seconds since the epoch.
    """
    usual = {
        name: Counter(one.versions[name] for one in found).most_common(1)[0][0]
        for name in (found[0].versions if found else ())
    }
    wrong = []
    for one in found:
        for name, version in one.versions.items():
            if version != usual[name]:
                other = next(each for each in found if each.versions[name] == usual[name])
                rule = f"has {name} {version}, and {other.host} ({other.address}) has {usual[name]}"
                wrong.append(Fault(one, "versions", rule, "Install the same on all hosts"))
        if one.device:
            rule = f"its GPU fails the first operation ({one.device})"
            hint = "Check nvidia-smi there, or take the host out of the cluster"
            wrong.append(Fault(one, "device", rule, hint))
        if one.storage:
            rule = f"can't use the run directory ({one.storage})"
            hint = "Give all hosts the same storage and credentials; a local path must be shared"
            wrong.append(Fault(one, "storage", rule, hint))
        if abs(one.clock_s - now_s) > MAX_CLOCK_S:
            rule = f"its clock is {one.clock_s - now_s:+.0f} s off the driver's"
            wrong.append(Fault(one, "clock", rule, "Set the clock there (chrony or NTP)"))
    return wrong


def require_compatible(
    found: Sequence[HostInfo], now_s: float, *, exact: bool = False
) -> list[str]:
    """Raise ClusterError for the first of :func:`faults`; return warnings.

    Different models of GPUs are a warning, or an error if the run is to be ``exact``.
    """
    for host, _, rule, hint in faults(found, now_s):
        raise ClusterError(f"host {host.host} ({host.address})", rule, hint=hint)
    message = mixed_gpus(found)
    if message and exact:
        rule = f"{message}, which round differently; run.reduction = 'canonical' needs one model"
        hint = "Choose hosts by cluster.labels, or use run.reduction = 'fast'"
        raise ClusterError("GPUs", rule, hint=hint)
    return [f"{message}: the slowest determines the speed of all"] if message else []


def mixed_gpus(found: Sequence[HostInfo]) -> str:
    """Return which workers have which GPUs; "" if all are the same model."""
    hosts: dict[str, set[str]] = {}
    for one in found:
        hosts.setdefault(one.gpu, set()).add(one.host)
    if len(hosts) < 2:
        return ""
    models = [f"{gpu or 'none'} (on {_shortened(sorted(hosts[gpu]))})" for gpu in sorted(hosts)]
    return f"the workers have different GPUs: {_shortened(models)}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
