"""What workers must have in common before they train together, looked at on each of their hosts."""

from __future__ import annotations

import platform
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from gatdist.config import Config
from gatdist.errors import ClusterError, GatdistError
from gatdist.storage import Store
from gatdist.version import __version__

# Object stores refuse requests whose clock is 15 minutes off.
MAX_CLOCK_S = 300.0
_PREFIX = "launching-"


class Facts(NamedTuple):
    """Of one worker.

    Attributes:
        host: its name.
        address: its own.
        versions: of Python (major and minor), torch and gatdist.
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
    store = Store(run_dir, config.run.storage_options)
    for left in store.list():
        if left.startswith(_PREFIX):  # by a driver that was killed
            store.delete(left)
    name = f"{_PREFIX}{uuid.uuid4().hex}"
    store.publish(name, name.encode())
    try:
        yield Token(run_dir, config.run.storage_options, name)
    finally:
        with suppress(GatdistError):
            store.delete(name)


def facts(address: str, expected: Token, use_gpu: bool) -> Facts:
    """Look around in this process, which is a worker's.

    Args:
        address: of this host, as Ray knows it.
        expected: must be found.
        use_gpu: whether a CUDA device is to be tried.
    """
    import torch

    versions = {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "gatdist": __version__,
    }
    device = ""
    if use_gpu:
        try:
            torch.ones(2, device="cuda").sum().item()
        except (RuntimeError, AssertionError) as error:
            device = str(error).splitlines()[0]
    storage = _storage_error(expected)
    return Facts(socket.gethostname(), address, versions, time.time(), device, storage)


def _storage_error(expected: Token) -> str:
    try:
        store = Store(expected.url, expected.options, retry_budget_s=10)
        if store.read(expected.name).decode() == expected.name:
            return ""
        return f"{store.url} is another folder there"
    except GatdistError as error:
        return str(error)


def require_alike(found: Sequence[Facts], now_s: float) -> None:
    """Raise if workers can't train together.

    Args:
        found: facts of all of them.
        now_s: the time at the driver when they were gathered, seconds since the epoch.

    Raises:
        ClusterError: the first thing that is wrong, with its host.
    """
    first = found[0]
    for one in found:
        where = f"host {one.host} ({one.address})"
        for name, version in one.versions.items():
            if version != first.versions[name]:
                raise ClusterError(
                    where,
                    f"has {name} {version}, and {first.host} ({first.address}) has "
                    f"{first.versions[name]}",
                    mend="Install the same on all hosts",
                )
        if one.device:
            raise ClusterError(
                where,
                f"its GPU fails the first operation ({one.device})",
                mend="Check nvidia-smi there, or take the host out of the cluster",
            )
        if one.storage:
            raise ClusterError(
                where,
                f"can't use the run directory ({one.storage})",
                mend="Give all hosts the same storage and credentials; a local path must be shared",
            )
        if abs(one.clock_s - now_s) > MAX_CLOCK_S:
            raise ClusterError(
                where,
                f"its clock is {one.clock_s - now_s:+.0f} s off the driver's",
                mend="Set the clock there (chrony or NTP)",
            )
