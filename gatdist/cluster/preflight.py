"""What workers must have in common before they train together, looked at on each of their hosts."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from gatdist.common.errors import ClusterError, GatdistError
from gatdist.common.version import __version__
from gatdist.config import Config
from gatdist.storage import Store

# Object stores refuse requests whose clock is 15 minutes off.
MAX_CLOCK_S = 300.0
_PREFIX = "launching-"


class HostInfo(NamedTuple):
    """Of one worker.

    Attributes:
        host: its name.
        address: its own.
        versions: of Python (major and minor), torch, Ray and gatdist.
        clock_s: seconds since the epoch.
        device: what failed in the device's first operation; "".
        storage: why the run directory can't be used from there; "".
    """

    host: str
    address: str
    versions: dict[str, str]
    clock_s: float
    device: str
    storage: str


class Fault(NamedTuple):
    """Why a host can't train with the others.

    Attributes:
        host: its facts.
        about: ``versions``, ``device``, ``storage`` or ``clock``.
        rule: what is wrong, for people.
        hint: what to do about it.
    """

    host: HostInfo
    about: str
    rule: str
    hint: str


class Token(NamedTuple):
    """A file in the run directory that all hosts must see.

    Attributes:
        url: of the run directory.
        options: of its storage.
        name: of the file; its content is the name.
    """

    url: str
    options: dict[str, Any]
    name: str


@contextmanager
def token(config: Config, run_dir: str) -> Iterator[Token]:
    """A file that the driver leaves in the run directory for as long as workers start.

    Raises:
        StorageError: it can't be written there.
    """
    options = config.run.storage_options
    store = Store(run_dir, options)
    with suppress(GatdistError):  # left by drivers that were killed
        store.delete_files(left for left in store.list() if left.startswith(_PREFIX))
    with left_token(store, run_dir, options, _PREFIX) as found:
        yield found


@contextmanager
def left_token(store: Store, url: str, options: Mapping[str, Any], prefix: str) -> Iterator[Token]:
    """A file that is there for a while.

    Args:
        store: where.
        url: of that store, secrets and all.
        options: of that store.
        prefix: of the file's name.

    Raises:
        StorageError: it can't be written there.
    """
    name = f"{prefix}{uuid.uuid4().hex}"
    store.publish(name, name.encode())
    try:
        yield Token(url, dict(options), name)
    finally:
        with suppress(GatdistError):
            store.delete_files([name])


def facts(address: str, expected: Token, use_gpu: bool) -> HostInfo:
    """Look around in this process, which is a worker's.

    Args:
        address: of this host, as Ray knows it.
        expected: must be found.
        use_gpu: whether a CUDA device is to be tried.
    """
    device = device_error() if use_gpu else ""
    storage = storage_error(expected)
    return HostInfo(socket.gethostname(), address, versions(), time.time(), device, storage)


def versions() -> dict[str, str]:
    """Of what must be alike on all hosts, by name."""
    import torch

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "Ray": importlib.metadata.version("ray"),
        "gatdist": __version__,
    }


def device_error() -> str:
    """What a CUDA device's first operation fails with, in one line; "" if it does not."""
    import torch

    try:
        torch.ones(2, device="cuda").sum().item()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def storage_error(expected: Token, *, retry_budget_s: float = 10.0, stall_s: float = 30.0) -> str:
    """Why a token can't be read from this process; "" if it can. For the times see ``Store``."""
    try:
        store = Store(
            expected.url, expected.options, retry_budget_s=retry_budget_s, stall_s=stall_s
        )
        if store.read_if_exists(expected.name) == expected.name.encode():
            return ""
        return f"{store.url} is another folder there"
    except GatdistError as error:
        return str(error)


def faults(found: Sequence[HostInfo], now_s: float) -> list[Fault]:
    """All that keeps workers from training together.

    Args:
        found: facts of all of them.
        now_s: the time at the driver when they were gathered, seconds since the epoch.

    Returns:
        What is wrong, host by host. Versions are compared with those that most hosts have.
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


def require_alike(found: Sequence[HostInfo], now_s: float) -> None:
    """Raise if workers can't train together. See :func:`faults` for the arguments.

    Raises:
        ClusterError: the first thing that is wrong, with its host.
    """
    for host, _, rule, hint in faults(found, now_s):
        raise ClusterError(f"host {host.host} ({host.address})", rule, hint=hint)
