"""Workers that hold the others up, found in the times that each takes for its own work.

In a synchronized step all workers take as long as the slowest: the others wait, and their clocks
show it as communication. What tells them apart is the time left when that is taken away. Where
communication itself is slow, what waits to be sent tells whose link it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

_COMMUNICATION, _STEP = "time/communication_s", "time/step_s"
# A worker that is late by less than this share of a step holds nobody up.
_LEAST_SHARE = 0.2
# A link is slow where the others communicate for more than this share of a step, ...
_SLOW_SHARE = 0.5
# ... and so much waits to be sent, so many times as much as elsewhere. Where a receiver is what is
# slow, much waits, too, but the receiver does not.
_LEAST_UNSENT_BYTES, _UNSENT_FACTOR = 4 * 2**10, 4


class WorkerTimes(NamedTuple):
    """Of one worker.

    Attributes:
        host: where it runs.
        seconds: mean seconds a step by tag: ``time/<phase>_s``, ``time/step_s``, and
            ``time/communication_s``, in which it waited for others.
        unsent_bytes: that waited to be sent from its host, on average.
    """

    host: str
    seconds: Mapping[str, float]
    unsent_bytes: float = 0.0

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
    """The workers that hold the others up, for having more work at a step or a slow link.

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
        late_s = mine.busy_s - usual_s
        waited = median(o.seconds[_COMMUNICATION] / o.seconds[_STEP] for o in others)
        if waited > _SLOW_SHARE and _much_waits_to_be_sent(mine, others):
            phase = "communication"
            why = (
                f"its network is slow, {mine.unsent_bytes / 1e3:,.0f} kB wait to be sent while "
                f"they wait for {waited:.0%} of a step"
            )
        elif mine.busy_s > factor * usual_s and late_s > _LEAST_SHARE * mine.seconds[_STEP]:
            phase = _slowest_phase(mine, others)
            why = (
                f"it works {mine.busy_s:.3g} s at a step, they {usual_s:.3g} s; "
                f"it loses most in phase {phase!r}"
            )
        else:
            continue
        message = f"worker {rank} on {mine.host} holds the others up: {why}"
        found.append(Straggler(rank, phase, message))
    return found


def _much_waits_to_be_sent(mine: WorkerTimes, others: Sequence[WorkerTimes]) -> bool:
    usual = median(other.unsent_bytes for other in others)
    return mine.unsent_bytes > max(_LEAST_UNSENT_BYTES, _UNSENT_FACTOR * usual)


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
