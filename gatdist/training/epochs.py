"""Changes of the workers during a run.

The workers of a new epoch continue from the last step that one of them has made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gatdist.common.errors import WorkerLostError
from gatdist.common.position import here
from gatdist.config import PlayerName
from gatdist.game import Phase
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.runs import Change
from gatdist.training.integrity import require_equal_replicas
from gatdist.training.ledger import Ledger
from gatdist.training.progress import Progress
from gatdist.training.state import TrainState

NOTHING = (-1, -1)  # reached by a worker that holds no state


@dataclass(frozen=True)
class Standing:
    """Where a worker is.

    Attributes:
        reached: samples seen, and :attr:`~gatdist.training.ledger.Ledger.settled`.
        place: what it runs on.
        writes: whether it is the worker that writes.
        undid: whether it has undone a step.
    """

    reached: tuple[int, int]
    place: dict[str, Any]
    writes: bool
    undid: bool = False


@dataclass(frozen=True)
class Agreement:
    """What all workers agree on.

    Attributes:
        workers: their standings, by rank.
        sources: ranks of those that hold the newest tensors.
        settled: of those that have done most, see :class:`~gatdist.training.ledger.Ledger`.
        state: JSON values to continue from.
    """

    workers: tuple[Standing, ...]
    sources: tuple[int, ...]
    settled: int
    state: dict[str, Any]

    @property
    def steps_undone(self) -> int:
        """Steps that are repeated: a step that one of the workers has completed is not."""
        newest = max(worker.reached[0] for worker in self.workers)
        return int(any(worker.undid and worker.reached[0] == newest for worker in self.workers))

    @property
    def has_writer(self) -> bool:
        """Whether worker 0 is still the one that writes."""
        return self.workers[0].writes

    @property
    def is_written(self) -> bool:
        """Whether worker 0 has written all that was due, or will."""
        return self.has_writer and self.workers[0].reached[1] == self.settled


def agree(comm: Communicator, mine: Standing, state: Callable[[], dict[str, Any]]) -> Agreement:
    """Return what follows from the standings of all workers, which call this together.

    After a lost worker, one whose last collective has succeeded may be a step ahead of the others.
    Of those that are, the one that has done most after its step gives its ``state``.

    Raises:
        WorkerLostError: no worker holds the state.
    """
    values = [list(mine.reached), mine.place, mine.writes, mine.undid]
    gathered = comm.all_gather_object(values)
    workers = tuple(Standing((r[0], r[1]), *rest) for r, *rest in gathered)
    reached = [worker.reached for worker in workers]
    newest = max(reached)
    if newest == NOTHING:
        raise WorkerLostError("no worker is left that holds the state")
    source = reached.index(newest)
    said = comm.broadcast_object(state() if comm.rank == source else None, source)
    # What follows a step may have changed the state of some, such as recomputed statistics.
    is_settled = newest[0] == newest[1]
    sources = tuple(r for r, each in enumerate(reached) if each == newest and is_settled)
    sources = sources or (source,)
    return Agreement(workers, sources, newest[1], said)


class StepStart:
    """A copy of the training state on its device, renewed in each step.

    A lost worker leaves a step half made, perhaps after the discriminator's update. Weights and
    moments of a player are copied before they are updated, and not at all in the last phase: once
    its communication is over, a step can't be interrupted. On CUDA, where communication may fail
    after it was started, all is copied at the start of the step.

    Attributes:
        is_open: whether a step has begun and not ended.
        began_s: when the last step began, by :func:`time.perf_counter`.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.is_open, self.began_s = False, 0.0
        self._at_start: _Copy | None = None
        self._of_players: dict[PlayerName, _Copy] = {}
        self._taken: list[_Copy] = []
        self._is_in_last_phase = False
        if state.reduction.comm.device.type != "cuda":
            state.before_optimizers = self._before_optimizers

    def begin(self, *, whole: bool = False) -> None:
        """Copy what a step changes before its first update, or the whole state."""
        self.began_s = time.perf_counter()
        if self._at_start is None:
            self._at_start = self._choose()
        first = self._at_start
        if whole and self._of_players:
            first = _Copy(list(self._state.tensors().values()))
        self._taken = [first.take()]
        self.is_open, self._is_in_last_phase = True, False

    def end(self) -> None:
        """Keep what the step has made."""
        self.is_open = False
        self._taken.clear()

    def undo(self) -> bool:
        """Return to the start of the step, unless it has ended; return whether it had not.

        Raises:
            WorkerLostError: a phase that was to be the last was followed by communication.
        """
        undoes = self.is_open
        if undoes:
            if self._is_in_last_phase:
                raise WorkerLostError("the update rule communicates after its last phase")
            for copy in self._taken:
                copy.restore()
            self._state.loaded()
        self.end()
        return undoes

    def _choose(self) -> _Copy:
        """Choose what to copy when, once: that takes as long as a copy."""
        state = self._state
        if state.reduction.comm.device.type == "cuda":
            return _Copy(list(state.tensors().values()))
        later = {name: player.changed_by_step() for name, player in state.players.items()}
        self._of_players = {name: _Copy(tensors) for name, tensors in later.items()}
        average = state.average.network.state_dict().values()  # changes after the last phase
        known = {_place(tensor) for tensors in (*later.values(), average) for tensor in tensors}
        return _Copy([t for t in state.tensors().values() if _place(t) not in known])

    def _before_optimizers(self, phase: Phase) -> None:
        self._is_in_last_phase |= phase.is_last
        if self.is_open and not phase.is_last:
            copies = [self._of_players[name] for name in phase.players]
            self._taken += [copy.take() for copy in copies if copy not in self._taken]


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


class _Copy:
    """A copy of tensors, to which they can return."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors, self._copies = tensors, [torch.empty_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def take(self) -> _Copy:
        torch._foreach_copy_(self._copies, self._tensors)
        return self

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._tensors, self._copies)


@dataclass
class Transition:
    """The time between two epochs, which ends when all workers continue.

    Attributes:
        before: number of workers of the last epoch; 0 for a worker that joins.
        began_s: when this worker has noticed its end, by :func:`time.perf_counter`.
        lost_from_s: when the step began that was undone; if there is none, ``began_s``.
        undid: whether this worker has undone a step that the others do not know of.
        steps_undone: steps that are repeated.
        causes: why the workers change, each once.
    """

    before: int
    began_s: float
    lost_from_s: float
    undid: bool = False
    steps_undone: int = 0
    causes: dict[str, None] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.began_s

    @property
    def lost_s(self) -> float:
        """The same with what was spent on a step that was undone."""
        return time.perf_counter() - self.lost_from_s

    def cause(self, otherwise: str) -> str:
        """Return all causes, or ``otherwise`` if none is known."""
        return "; ".join(self.causes) or otherwise

    def change(self, samples_seen: int, workers: int, reason: str) -> Change:
        """Return its record, once ``workers`` continue from ``samples_seen``."""
        return Change(
            attempt=here.attempt,
            samples_seen=samples_seen,
            before=self.before,
            workers=workers,
            steps_undone=self.steps_undone,
            seconds=round(self.seconds, 3),
            lost_s=round(self.lost_s, 3),
            reason=reason,
        )


class Epochs:
    """A worker's way from one epoch to the next.

    Args:
        members: the workers.
        state: of the run.
        ledger: of the run.
        place: what this worker runs on.
        progress: of this worker.

    Attributes:
        step_start: undoes a step that a lost worker has interrupted.
        is_whole: whether this worker holds a state from which training can continue.
        writes: whether it is the worker that writes.
        transition: how the last change of workers went.
    """

    def __init__(
        self,
        members: Members,
        state: TrainState,
        ledger: Ledger,
        place: dict[str, Any],
        progress: Progress,
    ) -> None:
        self._members, self._state, self._ledger = members, state, ledger
        self._place, self._progress = place, progress
        self.step_start = StepStart(state)
        self.is_whole = not members.is_joining
        if not self.is_whole:
            progress.saved_samples = -1  # the others' progress is not for it to give up
        self.writes = False
        self.end()

    def end(self) -> None:
        """Take note that the present epoch has ended."""
        now, members = time.perf_counter(), self._members
        before = 0 if members.is_joining else members.world_size
        self.transition = Transition(before, began_s=now, lost_from_s=now)

    def begin(self) -> Agreement:
        """Begin the next epoch, in which all workers hold the newest tensors and their ledger.

        It may be called again if a further loss interrupts what follows.

        Raises:
            RetryableError: this worker can't continue.
            DataError: this worker joins, and has other data.
            RuntimeError: one more worker was lost meanwhile.
        """
        members, ledger, change = self._members, self._ledger, self.transition
        self._progress.enter("members")
        with self._progress.lengthy():
            cause = members.change()
        change.causes |= dict.fromkeys([cause] if cause else [])
        here.rank = members.rank
        if self.step_start.undo():
            change.undid, change.lost_from_s = True, self.step_start.began_s
        if members.is_joining:  # it may have been a member before steps of the others
            self.is_whole = False
        reached = (self._state.samples_seen, ledger.settled) if self.is_whole else NOTHING
        mine = Standing(reached, self._place, self.writes, change.undid)
        agreement = agree(members, mine, ledger.handover)
        change.steps_undone, change.undid = change.steps_undone or agreement.steps_undone, False
        if members.is_joining:
            ledger.require_same_data(agreement.state)
        if len(agreement.sources) < members.world_size:
            self.is_whole = members.rank in agreement.sources
            self._progress.enter("heal")
            self._state.share(agreement.sources)
        require_equal_replicas(self._state.tensors(), members)
        self.is_whole, members.is_joining = True, False
        ledger.take_over(agreement.state, agreement.settled)
        return agreement
