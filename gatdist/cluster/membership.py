"""How a worker learns its place in the next epoch of a run, and connects with the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from gatdist.cluster.roster import Address, Seat
from gatdist.common.errors import ClusterError, WorkerLostError
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Membership

_LOOK_S = 0.02


class LeftBehindError(WorkerLostError):
    """The run continues without this worker."""


class Channel(Protocol):
    """A worker's way to the roster."""

    def arrive(self, meets_at: Address) -> None:
        """See :meth:`~gatdist.cluster.roster.Roster.arrive`."""

    def seat(self) -> Seat | None:
        """See :meth:`~gatdist.cluster.roster.Roster.seat`.

        Raises:
            LeftBehindError: this worker does not take part any more.
        """

    def is_due(self) -> bool:
        """See :attr:`~gatdist.cluster.roster.Roster.is_due`; does not wait."""


class RosterMembership(Membership):
    """A worker whose place a roster decides.

    Args:
        channel: to the roster.
        form: forms the process group of a seat; returns its communicator, and a function that
            fails all of its collectives.
        end: ends the present group, whose collectives have failed.
        meets_at: returns an address of this worker at which others can meet.
        wait_s: how long to wait for an epoch.

    Attributes:
        epoch: number of the present epoch, or of the one that is about to form.
    """

    def __init__(
        self,
        channel: Channel,
        form: Callable[[Seat], tuple[Communicator, Callable[[], None]]],
        end: Callable[[], None],
        meets_at: Callable[[], Address],
        abort: Callable[[], None] = lambda: None,
        wait_s: float = 600.0,
    ) -> None:
        self._channel, self._form, self._end, self._meets_at = channel, form, end, meets_at
        self._abort, self._wait_s = abort, wait_s
        self.epoch = 1

    def abort(self) -> None:
        """Fail all collectives of the present epoch. Any thread may call this."""
        self._abort()

    def next(self) -> Communicator:
        self._abort()
        self._abort = lambda: None
        self._end()
        causes: dict[str, None] = {}
        self.joins = False
        while True:
            self._channel.arrive(self._meets_at())
            seat = self._seat()
            causes[seat.cause] = None
            self.joins = self.joins or seat.joins
            self.epoch = seat.epoch  # before it forms: what was ordered in the last one is void
            try:
                communicator, self._abort = self._form(seat)
            except ClusterError:  # one of them was lost meanwhile
                self._end()
            else:
                self.cause = "; ".join(filter(None, causes))
                return communicator

    def is_due(self) -> bool:
        return self._channel.is_due()

    def _seat(self) -> Seat:
        until = time.monotonic() + self._wait_s
        while time.monotonic() < until:
            if seat := self._channel.seat():
                return seat
            time.sleep(_LOOK_S)
        raise WorkerLostError(f"no other workers within {self._wait_s:.0f} s")
