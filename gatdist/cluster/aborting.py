"""Aborts the collectives of a process group from any thread, also those that wait for a peer."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from gatdist.cluster.roster import Address

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

_WILDCARDS = ("0.0.0.0", "::")


class GlooSockets:
    """The connections of a group of Gloo, which can't be aborted by its own means.

    Each process of a group listens at an address, and its peers connect to it. Shutting these
    connections down fails every collective here at once, and then those of the peers. Begin this
    before the group is formed.
    """

    def __init__(self) -> None:
        self._before = _listening()
        self._addresses: set[Address] = set()

    def exchange(self, store: Store, rank: int, world_size: int) -> None:
        """Exchange with the other workers where each listens."""
        mine = [
            f"{host} {port}"
            for host, port in _listening() - self._before
            if host not in _WILDCARDS  # the store's
        ]
        store.set(f"listens/{rank}", ",".join(mine))
        for each in range(world_size):
            for line in filter(None, store.get(f"listens/{each}").decode().split(",")):
                host, _, port = line.partition(" ")
                self._addresses.add((host, int(port)))

    def shut_down(self) -> None:
        """Shut all connections down. Any thread may call this, at any time."""
        for one in _sockets():
            with suppress(OSError):  # not connected, or by now closed
                if {_address(one.getsockname()), _address(one.getpeername())} & self._addresses:
                    one.shutdown(socket.SHUT_RDWR)


def aborter(device: torch.device, sockets: GlooSockets) -> Callable[[], None]:
    """Return a function that fails all collectives of the default group, now and later."""
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(device)
    if "Gloo" in type(backend).__name__:
        return sockets.shut_down
    abort: Callable[[], None] = backend.abort
    return abort


def _listening() -> set[Address]:
    """Return the addresses at which this process listens."""
    return {
        _address(one.getsockname())
        for one in _sockets()
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    }


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of each internet socket of this process."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # by now closed
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    yield one


def _address(found: tuple[object, ...]) -> Address:
    host, port = found[:2]
    return str(host).removeprefix("::ffff:"), int(str(port))
