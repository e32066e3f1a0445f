"""The time during which collectives are in flight, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

# So many intervals are added up at once, to bound memory; by then the older ones are over.
_MOST = 1024


class Clock(Protocol):
    """Marks points in time, which are read later."""

    def mark(self) -> Any:
        """Mark the present."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Return the times of marks, relative to the first one; wait until they have passed."""


class HostClock:
    """The clock of the host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Events on the current stream of a GPU."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        for mark in marks:
            mark.synchronize()
        found = [marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        self._free += marks
        return found


class InFlight:
    """Adds up the time in which at least one collective is in flight."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._intervals: list[Interval] = []
        self._seconds = 0.0

    def begin(self) -> Interval:
        """Return an interval that begins now; a collective's callback may end it in any thread."""
        if len(self._intervals) >= _MOST:
            self._add_up(_MOST // 2)
        self._intervals.append(Interval(self._clock))
        return self._intervals[-1]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        interval = self.begin()
        yield
        interval.end()

    def take_s(self) -> float:
        """Return and reset the seconds; waits for the device."""
        self._add_up(len(self._intervals))
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_up(self, count: int) -> None:
        over, self._intervals = self._intervals[:count], self._intervals[count:]
        marks = [mark for one in over if one.stop is not None for mark in (one.start, one.stop)]
        times = self._clock.seconds(marks) if marks else []
        self._seconds += _union_s(sorted(zip(times[::2], times[1::2], strict=True)))


class Interval:
    """The time between two marks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.start: Any = clock.mark()
        self.stop: Any = None

    def end(self) -> None:
        """Mark its end."""
        self.stop = self._clock.mark()


def _union_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the total length of intervals that may overlap, sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
