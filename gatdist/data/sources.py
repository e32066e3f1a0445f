"""Sources of a loader: read ranges fetched ahead, or decoded samples in memory.

Samples are those of one worker, counted from where its loader begins. ``is_loaded`` returns whether
all before ``end`` can be decoded, ``release`` drops them, both with the loader's lock held.
``decode`` decodes samples ``begin`` to ``end``. ``close`` stops the threads, without the lock.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import UserError
from gatdist.data.dataset import Dataset
from gatdist.data.order import Indices, SampleOrder, WorkerShare
from gatdist.data.reading.plan import MemoryBudget, Plan, ReadRange, Segment

_GROUP_BYTES = 4 * 2**20  # fetched with one call
_LOOK_AHEAD = 4096  # samples


def start_threads(name: str, run: Callable[[], None], count: int) -> list[threading.Thread]:
    """Start daemon threads, numbered from 0."""
    threads = [threading.Thread(target=run, name=f"{name}-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads


class Decoded:
    """Source of a small data set, which is decoded once and stays in memory."""

    threads: Sequence[threading.Thread] = ()

    def __init__(self, dataset: Dataset, order: SampleOrder, share: WorkerShare) -> None:
        self._dataset, self._order, self._share = dataset, order, share
        self._lock = threading.Lock()
        self._begin, self._known = 0, np.empty(0, dtype=np.int64)

    def is_loaded(self, end: int) -> bool:
        return True

    def release(self, end: int) -> None:
        pass

    def decode(self, begin: int, end: int, samples: NDArray[Any], labels: Indices | None) -> None:
        samples[...], found = self._dataset.read(self._indices(begin, end))
        if labels is not None and found is not None:
            labels[...] = found

    def close(self) -> None:
        pass

    def _indices(self, begin: int, end: int) -> Indices:
        with self._lock:
            if begin < self._begin or end > self._begin + len(self._known):
                self._begin = begin
                positions = self._share.positions(begin, max(end, begin + _LOOK_AHEAD))
                self._known = self._order.indices(positions)
            return self._known[begin - self._begin : end - self._begin]


class Stream:
    """Source that fetches read ranges ahead, in background threads, in order of first use.

    About two segments of the plan are in memory; only the next batch may exceed the budget. The
    loader's ``lock`` guards all state, and is held when ``on_loaded`` reports progress or failure.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        budget: MemoryBudget,
        *,
        lock: threading.Lock,
        on_loaded: Callable[[], None],
        num_threads: int,
    ) -> None:
        self._dataset, self._plan = dataset, plan
        self._max_bytes, self._keeps = budget.fetched_bytes, budget.keeps
        self._lock, self._on_loaded = lock, on_loaded
        self._has_work = threading.Condition(lock)
        self._segments: deque[tuple[Segment, int]] = deque()  # and number of earlier read ranges
        self._planned_end = self._requested_end = 0
        self._is_planning = False
        self._num_planned = 0  # read ranges, which are numbered as they are planned
        self._to_fetch: deque[ReadRange] = deque()
        self._num_taken = 0  # being fetched, or fetched
        self._arrived: set[int] = set()
        self._num_loaded = 0  # all before this number have arrived
        self._num_requested = 0  # the next batch needs those before this number
        self._num_dropped = 0  # of the first segment
        self._held_bytes = 0
        self._failure: tuple[int, BaseException] | None = None
        self._closed = False
        self.threads = start_threads("fetch", self._run, num_threads)

    def is_loaded(self, end: int) -> bool:
        if end > self._planned_end:
            self._requested_end, self._num_requested = end, self._num_planned
            self._has_work.notify_all()
            return self._failure is not None
        needed = self._needed(end)
        if self._num_loaded >= needed or self._fails(needed):
            return True
        if needed > self._num_requested:
            self._num_requested = needed
            self._has_work.notify_all()
        return False

    def release(self, end: int) -> None:
        while self._segments:
            segment, _ = self._segments[0]
            if not self._keeps:
                self._drop(segment, end)
            if segment.end > end:
                return
            self._segments.popleft()
            self._num_dropped = 0
            self._has_work.notify_all()

    def decode(self, begin: int, end: int, samples: NDArray[Any], labels: Indices | None) -> None:
        with self._lock:
            if self._failure is not None and (
                end > self._planned_end or self._fails(self._needed(end))
            ):
                raise self._failure[1]
            parts = [
                (segment, max(begin, segment.begin), min(end, segment.end))
                for segment, _ in self._segments
                if segment.begin < end and begin < segment.end
            ]
        for segment, first, last in parts:
            here = slice(first - segment.begin, last - segment.begin)
            self._dataset.decode(
                segment.ranges,
                segment.range_of[here].tolist(),
                segment.numbers[here].tolist(),
                range(first - begin, last - begin),
                samples,
                labels,
            )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._to_fetch.clear()
            self._segments.clear()
            self._plan.forget()
            self._has_work.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    while (work := self._next_work()) is None and not self._closed:
                        self._has_work.wait()
                if work is None:
                    return
                work()
        except BaseException as error:
            self._fail(0, error)

    def _next_work(self) -> Callable[[], None] | None:
        if self._closed or self._failure is not None:
            return None
        if group := self._next_group():
            return partial(self._fetch, group, self._num_taken - len(group))
        # At an epoch's end a segment may be short, so that a batch spans three.
        is_idle = len(self._segments) < 2 and not self._to_fetch
        is_due = is_idle or self._planned_end < self._requested_end
        if is_due and not self._is_planning:
            self._is_planning = True
            return self._plan_next
        return None

    def _next_group(self) -> list[ReadRange]:
        group: list[ReadRange] = []
        group_bytes = 0
        while self._to_fetch:
            num_bytes = self._to_fetch[0].num_bytes
            fits = self._held_bytes + num_bytes <= self._max_bytes
            if not fits and self._num_taken >= self._num_requested:
                break
            if group and group_bytes + num_bytes > _GROUP_BYTES:
                break
            group.append(self._to_fetch.popleft())
            group_bytes += num_bytes
            self._num_taken += 1
            self._held_bytes += num_bytes
        return group

    def _plan_next(self) -> None:
        segment = self._plan.next()
        with self._lock:
            self._segments.append((segment, self._num_planned))
            self._to_fetch.extend(segment.new)
            self._num_planned += len(segment.new)
            self._planned_end = segment.end
            self._is_planning = False
            self._on_loaded()
            self._has_work.notify_all()

    def _fetch(self, group: list[ReadRange], number: int) -> None:
        try:
            self._dataset.fetch(group, lambda: self._closed)
            self._arrive(group, number)
        except UserError as error:
            if len(group) == 1:
                self._fail(number, error)
                return
            for i, each in enumerate(group):  # find the one that failed
                self._fetch([each], number + i)
        except Exception as error:
            self._fail(number, error)

    def _arrive(self, group: list[ReadRange], number: int) -> None:
        with self._lock:
            if self._closed:
                return
            for each in group:
                self._held_bytes += len(each.data) - each.num_bytes
                each.num_bytes = len(each.data)
            self._arrived.update(range(number, number + len(group)))
            while self._num_loaded in self._arrived:
                self._arrived.remove(self._num_loaded)
                self._num_loaded += 1
            self._on_loaded()

    def _drop(self, segment: Segment, end: int) -> None:
        before = self._held_bytes
        while self._num_dropped < len(segment.ranges) and (
            segment.last_used[self._num_dropped] < end
        ):
            each = segment.ranges[segment.dropped[self._num_dropped]]
            self._held_bytes -= each.num_bytes
            each.data, each.opened = b"", None
            self._num_dropped += 1
        if self._held_bytes < before:
            self._has_work.notify_all()

    def _needed(self, end: int) -> int:
        """Return the number of read ranges that all samples before ``end`` need."""
        for segment, before in reversed(self._segments):
            if segment.begin < end:
                return before + bisect_left(segment.new_from, end)
        return 0

    def _fails(self, needed: int) -> bool:
        return self._failure is not None and self._failure[0] < needed

    def _fail(self, number: int, error: BaseException) -> None:
        """Record that a read range can't be fetched. Later ones are not needed: no batch passes."""
        with self._lock:
            if self._failure is None or number < self._failure[0]:
                self._failure = number, error
            self._to_fetch.clear()
            self._on_loaded()
            self._has_work.notify_all()
