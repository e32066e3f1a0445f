"""The record of a run's changes of workers: ``worker_changes.jsonl``, one line for each change.

It is rewritten as a whole, since object stores can't append; changes are few.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from gatdist.common.errors import for_terminal
from gatdist.monitor.numbers import count, duration, plural
from gatdist.runs.directory import read_lines
from gatdist.storage import Store

CHANGES_FILE = "worker_changes.jsonl"
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_HOUR_S = 3600.0
HEAD = ("time", "samples", "workers", "took", "lost", "undone", "reason")


def _now() -> str:
    return time.strftime(_TIME, time.gmtime())


@dataclass(frozen=True)
class Change:
    """A change of the workers without a restart.

    Attributes:
        attempt: number of the attempt that recorded it.
        samples_seen: from which the workers continue.
        before: number of workers until then.
        workers: number of workers that continue.
        steps_undone: steps that they repeat.
        seconds: from the end of the last group of workers, as noticed, to the first step of the
            next one.
        lost_s: the same from the beginning of the undone step.
        reason: for the user.
        time: of its end, in UTC.
    """

    attempt: int
    samples_seen: int
    before: int
    workers: int
    steps_undone: int
    seconds: float
    lost_s: float
    reason: str
    time: str = field(default_factory=_now)

    @property
    def time_s(self) -> float:
        """The time, since the epoch."""
        return datetime.fromisoformat(self.time).timestamp()

    def cells(self) -> list[str]:
        """Return the row of a table with the titles :data:`HEAD`."""
        workers = f"{count(self.before)} → {count(self.workers)}"
        undone = plural(self.steps_undone, "step") if self.steps_undone else ""
        times = duration(self.seconds), duration(self.lost_s)
        return [self.time, count(self.samples_seen), workers, *times, undone, self.reason]


class ChangeLog:
    """The changes of a run, by time.

    Args:
        store: the run directory.
        known: changes that may not have been written.

    Attributes:
        is_written: whether the file has them all.
    """

    def __init__(self, store: Store, known: Sequence[Change] = ()) -> None:
        found = read_changes(store)
        self._changes = found + [change for change in known if change not in found]
        self._num_shown = len(found)
        self.is_written = len(found) == len(self._changes)

    def add(self, change: Change) -> None:
        self._changes.append(change)
        self.is_written = False

    def content(self) -> bytes:
        """Return the file's content."""
        return b"".join(json.dumps(asdict(each)).encode() + b"\n" for each in [*self._changes])

    def totals(self) -> dict[str, float]:
        """Return the numbers so far, by tag."""
        return totals(self._changes)

    def take(self) -> list[tuple[int, dict[str, float]]]:
        """Return samples seen and curves of each change that is new since the last call.

        At the first call, these are the changes that the file did not have.
        """
        first, self._num_shown = self._num_shown, len(self._changes)
        found = []
        for number, change in enumerate(self._changes[first : self._num_shown], first + 1):
            workers = {"throughput/workers": float(change.workers)}
            found.append((change.samples_seen, totals(self._changes[:number]) | workers))
        return found

    def markdown(self, most: int = 50) -> str:
        """Return the last changes as a table, the newest first; "" without any."""
        if not self._changes:
            return ""
        rows = [each.cells() for each in reversed(self._changes[-most:])]
        cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
        lines = (" | ".join(row) for row in (HEAD, ["---"] * len(HEAD), *cells))
        return "\n".join(f"| {line} |" for line in lines)

    def lost_shares(self) -> tuple[float, float]:
        """Return the shares of an hour that were lost until the last change but one, and now."""
        return _lost_share(self._changes[:-1]), _lost_share(self._changes)


def totals(changes: Iterable[Change]) -> dict[str, float]:
    """Return numbers of all changes together, by tag."""
    changes = [*changes]
    return {
        "workers/changes": float(len(changes)),
        "workers/steps_undone": float(sum(each.steps_undone for each in changes)),
        "workers/change_s": sum(each.seconds for each in changes),
        "workers/lost_s": sum(each.lost_s for each in changes),
    }


def _lost_share(changes: Sequence[Change]) -> float:
    """Return the share that changes took of the hour before the end of the last one."""
    if not changes:
        return 0.0
    since_s = changes[-1].time_s - _HOUR_S
    lost = (min(each.lost_s, each.time_s - since_s) for each in changes if each.time_s > since_s)
    return sum(lost) / _HOUR_S


def read_changes(store: Store) -> list[Change]:
    """Return the changes of the run in ``store``, without damaged lines."""
    found = (parse_change(each) for each in read_lines(store, CHANGES_FILE))
    return [change for change in found if change]


def parse_change(entry: dict[str, Any]) -> Change | None:
    """Return a line of the file; None if it is damaged."""
    numbers = ("attempt", "samples_seen", "before", "workers", "steps_undone")
    durations, texts = ("seconds", "lost_s"), ("reason", "time")
    try:
        change = Change(**{name: entry[name] for name in (*numbers, *durations, *texts)})
        whole = all(type(entry[name]) is int for name in numbers)
        finite = all(0 <= float(entry[name]) < math.inf for name in durations)
        if whole and finite and type(entry["reason"]) is str and change.time_s:
            return change
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    return None


def table(changes: Sequence[Change], most: int = 20) -> str:
    """Return the last changes as indented lines of text."""
    rows = [HEAD, *(each.cells() for each in changes[-most:])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, map(_one_line, row), widths)).rstrip() for row in rows)
    return "".join(f"\n    {line}" for line in lines)


def _one_line(cell: str) -> str:
    return " ".join(for_terminal(cell).split())
