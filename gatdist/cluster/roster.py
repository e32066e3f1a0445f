"""Who the workers of each epoch of a run are.

An epoch has a fixed set of workers and one process group. It ends when a worker is lost, or at the
end of a step when workers are to join or leave. The others *arrive* for the next epoch, which
begins once all of them have; workers that start meanwhile join it, as far as there is room. One
:class:`Roster` decides, in the driver's mailbox, so that no two groups of workers can both
continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gatdist.cluster.policies import largest

Address = tuple[str, int]


class Seat(NamedTuple):
    """A worker's place in an epoch."""

    epoch: int
    rank: int
    world_size: int
    master: Address  # where rank 0 lets the workers meet
    hosts: Mapping[int, str]  # of all workers, by rank, for messages
    cause: str = ""  # why the workers have changed, for the user
    joins: bool = False  # whether the worker was no member of the epoch before


class Arrival(NamedTuple):
    """A worker that waits for the next epoch."""

    meets_at: Address  # where the others could meet, if it becomes rank 0
    host: str


class Roster:
    """Decides who the workers of the next epoch are.

    Workers are named by any string that is never used again.

    Args:
        sizes: numbers of workers that an epoch may have, ascending.
        members: workers of the first epoch, by rank, whom the launcher connects.

    Attributes:
        epoch: number of the present epoch, from 1.
        members: its workers, by rank.
        lost: all workers that do not take part any more.
    """

    def __init__(self, sizes: Sequence[int], members: Sequence[str] = ()) -> None:
        self._sizes: Sequence[int] = sizes
        self.epoch, self.members = 1, list(members)
        self._members = {*members}
        self.lost: set[str] = set()
        self._leaving: set[str] = set()
        self._is_over = False
        self._waiting: dict[str, Arrival] = {}
        self._seats: dict[str, Seat] = {}
        self._causes: dict[str, None] = {}  # of the next epoch, each once

    def arrive(self, worker: str, meets_at: Address, host: str) -> None:
        """Let a worker wait for the next epoch."""
        self._seats.pop(worker, None)
        if worker in self.lost:
            return
        self._waiting[worker] = Arrival(meets_at, host)
        self.look()

    def lose(self, worker: str, cause: str = "") -> None:
        """Take note that a worker has died, or must not continue, and why."""
        self._blame(worker, cause)
        self.lost.add(worker)
        self._waiting.pop(worker, None)
        self.look()

    def leave(self, worker: str, cause: str = "") -> None:
        """Let a worker leave at the end of a step, as soon as the others suffice, and say why."""
        self._blame(worker, cause)
        self._leaving.add(worker)

    def accept_any_size(self) -> None:
        """Let all that are there begin the next epoch: they are only to save the state."""
        self._sizes = range(1, self._sizes[-1] + 1)

    def end(self) -> None:
        """Take note that the run is over: no epoch follows."""
        self._is_over = True

    def seat(self, worker: str) -> Seat | None:
        """Return the place of a worker that has arrived; None while the epoch has not begun."""
        return self._seats.get(worker)

    def is_member(self, worker: str) -> bool:
        """Return whether a worker takes part, or may yet do so."""
        return not self._is_over and worker not in self.lost

    @property
    def present(self) -> list[str]:
        """Workers of the present epoch that are not lost."""
        return [worker for worker in self.members if worker not in self.lost]

    @property
    def has_ended(self) -> bool:
        """Whether the present epoch is over, so that its workers must arrive."""
        return not (
            self.lost.isdisjoint(self._members) and self._waiting.keys().isdisjoint(self._members)
        )

    @property
    def is_due(self) -> bool:
        """Whether the workers are to change at the end of a step."""
        if self.has_ended:
            return False
        leaves = not self._leaving.isdisjoint(self._members)
        if not leaves and not self._waiting:
            return False
        size = self._size(len(self._staying) + len(self.joining))
        return size > len(self.members) or (leaves and self._can_do_without_leaving)

    @property
    def _staying(self) -> list[str]:
        """Workers of the present epoch that are neither lost nor to leave."""
        return [worker for worker in self.present if worker not in self._leaving]

    @property
    def _can_do_without_leaving(self) -> bool:
        """Whether those that stay, of whom one must hold the state, and those that join suffice."""
        size = self._size(len(self._staying) + len(self.joining))
        return bool(self._staying) and size > 0

    @property
    def joining(self) -> list[str]:
        """Workers that wait to join, without those that are to leave."""
        out = self._members | self.lost | self._leaving
        return [worker for worker in self._waiting if worker not in out]

    @property
    def late(self) -> list[str]:
        """Workers of an epoch that has ended who have not arrived for the next one."""
        return [w for w in self.present if w not in self._waiting] if self.has_ended else []

    def look(self) -> None:
        """Begin the next epoch if its workers are complete."""
        if not self.has_ended or self.late:
            return
        stay, new = self.present, self.joining
        if self._can_do_without_leaving:
            stay = self._staying
        size = self._size(len(stay) + len(new))
        if stay and size:
            self._begin(_ranked(self.members, stay, new[: max(0, size - len(stay))], size))

    def _size(self, available: int) -> int:
        return largest(self._sizes, available) or 0

    def _begin(self, members: list[str]) -> None:
        self.epoch += 1
        new = {rank for rank, worker in enumerate(members) if worker not in self._members}
        self.lost |= self._leaving - {*members}
        self.members, self._members = members, {*members}
        arrivals = [self._waiting.pop(worker) for worker in members]
        hosts = {rank: arrival.host for rank, arrival in enumerate(arrivals)}
        joined = f"a worker on {hosts[min(new)]}" if len(new) == 1 else f"{len(new)} workers"
        cause = "; ".join([*self._causes, *([f"{joined} joined"] if new else [])])
        self._causes.clear()
        self._seats.clear()
        for rank, worker in enumerate(members):
            self._seats[worker] = Seat(
                self.epoch, rank, len(members), arrivals[0].meets_at, hosts, cause, rank in new
            )

    def _blame(self, worker: str, cause: str) -> None:
        if cause and worker in self._members and worker not in self.lost:
            self._causes[cause] = None


def _ranked(before: Sequence[str], stay: Sequence[str], new: Sequence[str], size: int) -> list[str]:
    """Return the workers by rank: those that stay keep theirs, as far as possible.

    The first of them becomes rank 0 if that is vacant, since it holds the state.
    """
    stay = stay[:size]
    ranks = {before.index(worker): worker for worker in stay if before.index(worker) < size}
    moved = [worker for worker in stay if worker not in ranks.values()]
    if 0 not in ranks:
        first = stay[0]
        ranks = {0: first} | {rank: w for rank, w in ranks.items() if w != first}
        moved = [worker for worker in moved if worker != first]
    rest = iter([*moved, *new])
    return [ranks[rank] if rank in ranks else next(rest) for rank in range(size)]
