"""What the workers of a new epoch go on from: the last step that one of them has made."""

from __future__ import annotations

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
        state: JSON values to go on from; None if it holds no state.
        place: what it runs on.
        was_main: whether it has been the worker that writes.
    """

    reached: tuple[int, int]
    state: dict[str, Any] | None
    place: dict[str, Any]
    was_main: bool


@dataclass(frozen=True)
class Agreement:
    """What all workers agree on.

    Attributes:
        workers: their standings, by rank.
        sources: ranks of those that hold the newest state.
        newest: of them, the one that has done most after its last step.
    """

    workers: tuple[Standing, ...]
    sources: tuple[int, ...]
    newest: Standing

    @property
    def is_shared(self) -> bool:
        """Whether all workers hold the newest state."""
        return len(self.sources) == len(self.workers)


def agree(comm: Communicator, mine: Standing) -> Agreement:
    """Return what follows from the standings of all workers, which call this together.

    After a lost worker, one whose last collective has succeeded may be a step ahead of the others.

    Raises:
        WorkerLostError: no worker holds the state.
    """
    gathered = comm.all_gather_object([list(mine.reached), mine.state, mine.place, mine.was_main])
    workers = tuple(Standing((r[0], r[1]), *rest) for r, *rest in gathered)
    newest = max(workers, key=lambda worker: worker.reached)
    if newest.reached == NOTHING:
        raise WorkerLostError("no worker is left that holds the state")
    samples = newest.reached[0]
    sources = tuple(r for r, worker in enumerate(workers) if worker.reached[0] == samples)
    return Agreement(workers, sources, newest)
