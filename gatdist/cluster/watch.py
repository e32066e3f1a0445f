"""Which worker the others wait for: a policy without Ray, which looks at the workers' pulses.

A worker that is stopped or cut off goes silent. One that is deadlocked keeps its pulse, but enters
no phase any more; then nor do the others, who wait for it. It is the one that is behind: that has
entered fewest phases, or stands in the same phase and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Heartbeat(NamedTuple):
    """The last sign of a worker.

    Attributes:
        rank: of the worker.
        host: its name.
        node: id of the host, as Ray knows it.
        actor: id of the worker, as Ray knows it.
        pid: process id.
        phase: where its training thread is.
        step: steps made since the run began.
        moves: how many phases it has entered.
        silent_s: since its last sign.
        still_s: since its last heartbeat.
        waits: whether its training thread waits for other workers; None if it has not told.
        lengthy: whether it starts, compiles or does something else of that length.
        samples_seen: by the steps it has made.
        is_saved: on worker 0, whether the newest checkpoint holds all of these steps.
    """

    rank: int
    host: str
    node: str
    actor: str
    pid: int
    phase: str
    step: int
    moves: int
    silent_s: float
    still_s: float
    waits: bool | None = None
    lengthy: bool = False
    samples_seen: int = 0
    is_saved: bool = False

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Heartbeat:
        """A pulse of JSON values, of which there may be more."""
        return cls(**{name: fields[name] for name in cls._fields if name in fields})

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.host} (process {self.pid})"


class StragglerReport(NamedTuple):
    """What the workers wait for.

    Attributes:
        workers: those that are late.
        for_s: for how long.
        message: for people.
    """

    workers: tuple[Heartbeat, ...]
    for_s: float
    message: str


def straggler_report(
    heartbeats: Sequence[Heartbeat], straggler_warn_s: float, lengthy_s: float = 0.0
) -> StragglerReport | None:
    """Who is late by more than ``straggler_warn_s``, or None.

    As long as one worker has heartbeats, the others may wait for it.

    Args:
        heartbeats: of all workers.
        straggler_warn_s: seconds.
        lengthy_s: seconds that a :attr:`~Heartbeat.lengthy` operation may take beyond that.
    """
    if not heartbeats:
        return None
    silent = [heartbeat for heartbeat in heartbeats if heartbeat.silent_s > straggler_warn_s]
    if silent:
        for_s = max(heartbeat.silent_s for heartbeat in silent)
        return StragglerReport(tuple(silent), for_s, _message(silent, for_s, "has given no sign"))
    for_s = min(heartbeat.still_s - lengthy_s * heartbeat.lengthy for heartbeat in heartbeats)
    if for_s <= straggler_warn_s:
        return None
    fewest = min(heartbeat.moves for heartbeat in heartbeats)
    behind = [heartbeat for heartbeat in heartbeats if heartbeat.moves == fewest]
    working = [heartbeat for heartbeat in behind if heartbeat.waits is False]
    late = working or behind
    return StragglerReport(tuple(late), for_s, _message(late, for_s, "has not moved"))


def _message(late: Sequence[Heartbeat], for_s: float, what: str) -> str:
    first = late[0]
    who = " and ".join(map(str, late))
    where = f"phase {first.phase!r} of step {first.step:,}"
    return f"{who} {what} for {for_s:.0f} s; last seen in {where}"
