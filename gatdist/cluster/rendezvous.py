"""Forms the process group: waits for all workers, then makes the first collective.

NCCL opens its connections at the first collective, Gloo when the group is formed. Both happen here
within a time limit, so workers that do not start are distinguished from workers that can't reach
one another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from gatdist.cluster.aborting import GlooSockets, aborter
from gatdist.common.errors import ClusterError, summary

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

# After a failure, how long to wait for what the other workers report.
_GRACE_S = 3.0
# Beyond the backend's own limit, whose error says more.
_BEYOND_S = 5.0
_MOST_NAMES = 8


def join(
    backend: str,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    master: tuple[str, int],
    host: str,
    arrive_s: float,
    connect_s: float,
    known_hosts: Mapping[int, str] | None = None,
) -> Callable[[], None]:
    """Form the default process group; all its ``world_size`` workers call this function.

    Returns a function that any thread may call, which fails all collectives of the group.

    Args:
        backend: ``gloo`` or ``nccl``.
        device: of this worker. A GPU becomes the current one of this thread.
        rank: of this worker.
        world_size: number of workers.
        master: address and port of the store, which torchrun or else rank 0 serves.
        host: of this worker, for messages.
        arrive_s: how long to wait for all workers to start.
        connect_s: time limit of connecting them. It remains the timeout of collectives.
        known_hosts: of workers by rank, where the launcher has them.

    Raises:
        ClusterError: names the workers that did not start, or did not connect.
    """
    with _reaching(master):
        served = _opened(master, arrive_s, serves=rank == 0 and not _is_served_by_torchrun())
        # A client of its own: one that waits in another thread is locked.
        board = _Board(_opened(master, arrive_s, serves=False), rank, world_size)
        board.put("host", host)
        hosts = board.all("host", arrive_s)
        if len(hosts) < world_size:
            board.leave()
            missing = sorted(set(range(world_size)) - hosts.keys())
            raise ClusterError(
                "workers",
                f"{_named(missing, known_hosts or {})} did not join within {arrive_s:.0f} s; "
                f"{_named(hosts, hosts)} did",
                hint="Start all of them, and open all ports between their hosts",
            )
        sockets = GlooSockets()
        error = _within(
            connect_s + _BEYOND_S,
            lambda: _connect(backend, device, served, rank, world_size, connect_s, sockets),
        )
        board.put("error", f"{board.next_number():09d} {error}" if error else "")
        if error:
            errors = board.all("error", _GRACE_S)
            board.leave()
            raise ClusterError(
                "workers",
                f"they can't reach one another: {_explained(errors, hosts)}",
                hint="gatdist doctor --address … says which; open all ports between their hosts",
            )
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    return aborter(device, sockets)


# For collectives of workers that the driver ends if they hang: others may wait long for one that
# evaluates or writes.
DAY_S = 86400.0


def set_collective_timeout(seconds: float) -> None:
    """Change the timeout of the default process group's collectives."""
    import torch.distributed.distributed_c10d as c10d

    c10d._set_pg_timeout(timedelta(seconds=seconds))


def _connect(
    backend: str,
    device: torch.device,
    store: Store,
    rank: int,
    world_size: int,
    limit_s: float,
    sockets: GlooSockets,
) -> None:
    """Form the group and make its first collective."""
    _keep_records()
    import torch
    import torch.distributed as dist

    if device.type == "cuda":  # the current device belongs to the thread
        torch.cuda.set_device(device)
    limit = timedelta(seconds=limit_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    sockets.exchange(store, rank, world_size)
    count = torch.ones(1, device=device)
    dist.all_reduce(count)
    if int(count) != world_size:
        raise RuntimeError(f"a sum over {world_size} workers is {int(count)}")


def _keep_records() -> None:
    """Let torch keep its last collectives for :mod:`~gatdist.parallel.flight`."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def _within(seconds: float, function: Callable[[], None]) -> str:
    """Call ``function`` in a thread; return its error in one line, "" for none."""
    errors = [f"no answer within {seconds:.0f} s"]

    def call() -> None:
        try:
            function()
        except (RuntimeError, ValueError) as error:
            errors[0] = summary(error)
        else:
            errors[0] = ""

    # NCCL may wait for ever while it connects.
    thread = threading.Thread(target=call, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    return errors[0]


def _is_served_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _opened(master: tuple[str, int], seconds: float, *, serves: bool) -> Store:
    """Open the store, or a client of it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    found: list[Store] = []

    def open_store() -> None:
        limit = timedelta(seconds=seconds)
        store = TCPStore(*master, is_master=serves, timeout=limit, wait_for_workers=False)
        # torchrun's store has the keys of the processes before a restart.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        found.append(PrefixStore(f"gatdist/{restarts}", store))

    # Another server at this port may accept the connection and never answer.
    error = _within(seconds + _BEYOND_S, open_store)
    if serves and "EADDRINUSE" in error:
        hint = "Set MASTER_PORT to a free port, the same for all workers"
        raise ClusterError("MASTER_PORT", "is in use on this host", value=master[1], hint=hint)
    if error:
        raise RuntimeError(error)
    return found[0]


@contextmanager
def _reaching(master: tuple[str, int]) -> Iterator[None]:
    """Explain errors of the store."""
    try:
        yield
    except RuntimeError as error:
        address = ":".join(map(str, master))
        raise ClusterError(
            "workers",
            f"worker 0 did not start, has ended, or can't be reached at {address} "
            f"({summary(error)})",
            hint="Start all of them, and open all ports between their hosts",
        ) from error


class _Board:
    """What each worker has reported, in the store."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def put(self, what: str, value: str) -> None:
        self._store.set(f"{what}/{self._rank}", value)

    def all(self, what: str, seconds: float) -> dict[int, str]:
        """Return what the workers have put, by rank, once all have or after ``seconds``."""
        keys = [f"{what}/{rank}" for rank in range(self._world_size)]
        with suppress(RuntimeError):  # some are missing; or the store is, as the next call shows
            self._store.wait(keys, timedelta(seconds=seconds))
        present = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        return {rank: self._store.get(keys[rank]).decode() for rank in present}

    def next_number(self) -> int:
        """Return 1, 2, 3 … in the order of all workers' calls."""
        return int(self._store.add("number", 1))

    def leave(self) -> None:
        """Let the others read the store, which ends with worker 0."""
        if self._rank == 0:
            time.sleep(_GRACE_S)


def _named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Return the names of some workers, with their hosts where they are known."""
    names = [f"worker {r}{f' on {hosts[r]}' if r in hosts else ''}" for r in sorted(ranks)]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _explained(errors: Mapping[int, str], hosts: Mapping[int, str]) -> str:
    """Say which workers did not answer, and what failed first: the others waited for it."""
    silent = hosts.keys() - errors.keys()
    parts = [f"{_named(silent, hosts)} did not answer"] if silent else []
    failed = sorted((error.partition(" "), rank) for rank, error in errors.items() if error)
    parts += [f"{_named([rank], hosts)}: {error}" for (_, _, error), rank in failed[:2]]
    connected = [rank for rank, error in errors.items() if not error]
    if connected:
        parts.append(f"{_named(connected, hosts)} connected")
    return "; ".join(parts)
