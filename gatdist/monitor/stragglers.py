"""Workers that hold the others up, found in the times that each takes for its own work.

In a synchronized step all workers take as long as the slowest: the others wait, and their clocks
show it as communication. What tells them apart is the time left when that is taken away.
A slow link shows in the same way: who sends through it has what it needs of the others early, and
they wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

_COMMUNICATION, _STEP = "time/communication_s", "time/step_s"
# A worker that is late by less than this share of a step holds nobody up.
_LEAST_SHARE = 0.2


class WorkerTimes(NamedTuple):
    """Of one worker.

    Attributes:
        host: where it runs.
        seconds: mean seconds a step by tag: ``time/<phase>_s``, ``time/step_s``, and
            ``time/communication_s``, in which it waited for others.
    """

    host: str
    seconds: Mapping[str, float]

    @property
    def busy_s(self) -> float:
        """Seconds a step in which it did not wait for others."""
        return max(self.seconds[_STEP] - self.seconds[_COMMUNICATION], 0.0)


@dataclass(frozen=True)
class Straggler:
    """A slow worker.

    Attributes:
        rank: of the worker.
        phase: in which it loses most.
        message: for people.
    """

    rank: int
    phase: str
    message: str


def find_stragglers(times: Sequence[WorkerTimes], factor: float) -> list[Straggler]:
    """The workers that hold the others up.

    Args:
        times: of all workers by rank.
        factor: more than so many times as long as the others' median works at a step who holds
            them up; above 1.
    """
    found = []
    for rank, mine in enumerate(times):
        others = [other for r, other in enumerate(times) if r != rank]
        if not others:
            continue
        usual_s = median(other.busy_s for other in others)
        straggler_warn_s = mine.busy_s - usual_s
        if (
            mine.busy_s <= factor * usual_s
            or straggler_warn_s <= _LEAST_SHARE * mine.seconds[_STEP]
        ):
            continue
        phase = _slowest_phase(mine, others)
        message = (
            f"worker {rank} on {mine.host} holds the others up: of a step it takes "
            f"{mine.busy_s:.3g} s for itself, they {usual_s:.3g} s; most is lost in phase "
            f"{phase!r}. gatdist doctor tells whether its host or its network is slow"
        )
        found.append(Straggler(rank, phase, message))
    return found


def _slowest_phase(mine: WorkerTimes, others: Sequence[WorkerTimes]) -> str:
    """The phase in which a worker is furthest behind.

    Where one worker is slow the others wait for it within the same phase, so that its time tells
    little; then the longest of its own phases is blamed.
    """
    phases = [tag for tag in mine.seconds if tag not in (_COMMUNICATION, _STEP)]
    late = {
        tag: mine.seconds[tag] - median(o.seconds.get(tag, 0.0) for o in others) for tag in phases
    }
    tag = max(phases, key=lambda tag: late[tag])
    if late[tag] <= _LEAST_SHARE * mine.seconds[_STEP]:
        tag = max(phases, key=lambda tag: mine.seconds[tag])
    return tag.removeprefix("time/").removesuffix("_s")
