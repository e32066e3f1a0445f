"""How many workers a run has: policies without Ray, which look at numbers and return decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def room_for(needs: Mapping[str, float], hosts: Sequence[Mapping[str, float]]) -> int:
    """How many workers fit on hosts.

    Args:
        needs: what each worker needs, by resource.
        hosts: what each host has to give.
    """
    wanted = {name: amount for name, amount in needs.items() if amount > 0}
    return sum(
        int(min((has.get(name, 0.0) + 1e-6) // amount for name, amount in wanted.items()))
        for has in hosts
    )


def largest(sizes: Sequence[int], room: int) -> int | None:
    """The largest of ``sizes`` for which there is room; None if there is none."""
    return max((size for size in sizes if size <= room), default=None)


def is_worth_resizing(now: int, later: int, left_s: float, cost_s: float) -> bool:
    """Whether to go on with ``later`` workers instead of ``now``, by the time that it saves.

    Args:
        now: workers at work.
        later: workers there could be.
        left_s: seconds that the run would still take as it is.
        cost_s: seconds that a new start takes.
    """
    return later > now and left_s * (1 - now / later) > 2 * cost_s


@dataclass
class Growth:
    """Decides when a run takes in hosts that have joined: not for one that comes and goes.

    Attributes:
        patience_s: for how long the room must have been there.
        since_s: when it was first seen; None while there is none.
    """

    patience_s: float
    since_s: float | None = None

    def decide(
        self, now: int, later: int | None, left_s: float, cost_s: float, at_s: float
    ) -> bool:
        """Whether to resize now; see :func:`is_worth_resizing`. ``at_s`` is the present time."""
        if later is None or not is_worth_resizing(now, later, left_s, cost_s):
            self.since_s = None
            return False
        if self.since_s is None:
            self.since_s = at_s
        return at_s - self.since_s >= self.patience_s
