"""What the workers of a new epoch go on from: the last step that one of them has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gatdist.common.errors import WorkerLostError
from gatdist.parallel.communicator import Communicator

NOTHING = (-1, -1)  # reached by a worker that holds no state


@dataclass(frozen=True)
class Standing:
    """Where a worker is.

    Attributes:
        reached: samples seen, and samples seen at the last step after which all was done that was
            due: logging, evaluation, checkpoint.
        place: what it runs on.
        was_main: whether it has been the worker that writes.
    """

    reached: tuple[int, int]
    place: dict[str, Any]
    was_main: bool


@dataclass(frozen=True)
class Agreement:
    """What all workers agree on.

    Attributes:
        workers: their standings, by rank.
        sources: ranks of those that hold the newest tensors.
        settled: see :class:`Standing`.
        state: JSON values to go on from.
    """

    workers: tuple[Standing, ...]
    sources: tuple[int, ...]
    settled: int
    state: dict[str, Any]


def agree(comm: Communicator, mine: Standing, state: Callable[[], dict[str, Any]]) -> Agreement:
    """Return what follows from the standings of all workers, which call this together.

    After a lost worker, one whose last collective has succeeded may be a step ahead of the others.
    Of those that are, the one that has done most after its step gives its ``state``.

    Raises:
        WorkerLostError: no worker holds the state.
    """
    gathered = comm.all_gather_object([list(mine.reached), mine.place, mine.was_main])
    workers = tuple(Standing((r[0], r[1]), *rest) for r, *rest in gathered)
    reached = [worker.reached for worker in workers]
    newest = max(reached)
    if newest == NOTHING:
        raise WorkerLostError("no worker is left that holds the state")
    source = reached.index(newest)
    said = comm.broadcast_object(state() if comm.rank == source else None, source)
    sources = tuple(rank for rank, (samples, _) in enumerate(reached) if samples == newest[0])
    return Agreement(workers, sources, newest[1], said)
