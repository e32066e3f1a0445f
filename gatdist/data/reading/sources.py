"""Where a loader's samples come from: fetched ahead piece by piece, or from memory."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import UserError
from gatdist.data.order import Indices, SampleOrder
from gatdist.data.reading.plan import Piece, Plan, Stretch

if TYPE_CHECKING:
    from gatdist.data.dataset import Dataset

_GROUP_BYTES = 4 * 2**20  # fetched with one call
_AHEAD = 4096  # samples whose indices are looked up at once


class Source(Protocol):
    """A worker's samples, counted from where its loader begins.

    Attributes:
        threads: of its own.
    """

    threads: Sequence[threading.Thread]

    def is_loaded(self, end: int) -> bool:
        """Whether all samples before ``end`` can be decoded. Under the loader's lock."""

    def release(self, end: int) -> None:
        """Samples before ``end`` are not needed any more. Under the loader's lock."""

    def decode(self, begin: int, end: int, samples: NDArray[Any], labels: Indices | None) -> None:
        """Decode samples ``begin`` to ``end`` into arrays of that length."""

    def close(self) -> None:
        """Tell its threads to end. Not under the loader's lock."""


class Decoded:
    """A small data set, which is decoded once and stays in memory.

    Args:
        dataset: keeps its samples decoded.
        order: of the samples.
        plan: where the worker's samples stand.
    """

    def __init__(self, dataset: Dataset, order: SampleOrder, plan: Plan) -> None:
        self.threads: Sequence[threading.Thread] = ()
        self._dataset, self._order, self._plan = dataset, order, plan
        self._lock = threading.Lock()
        self._begin, self._known = 0, np.empty(0, dtype=np.int64)

    def is_loaded(self, end: int) -> bool:
        """Always: what is absent is read by :meth:`decode`."""
        return True

    def release(self, end: int) -> None:
        """All stays."""

    def decode(self, begin: int, end: int, samples: NDArray[Any], labels: Indices | None) -> None:
        """Copy samples out of memory."""
        samples[...], found = self._dataset.read(self._indices(begin, end))
        if labels is not None and found is not None:
            labels[...] = found

    def close(self) -> None:
        """Nothing to end."""

    def _indices(self, begin: int, end: int) -> Indices:
        with self._lock:
            if begin < self._begin or end > self._begin + len(self._known):
                self._begin = begin
                positions = self._plan.positions(begin, max(end, begin + _AHEAD))
                self._known = self._order.indices(positions)
            return self._known[begin - self._begin : end - self._begin]


class Stream:
    """Pieces of shards, fetched ahead by threads of their own, in the order of need.

    About two stretches of the plan are in memory. A piece is dropped when the last of its samples
    is released.

    Args:
        dataset: what is read.
        plan: of the worker.
        piece_bytes: the most that fetched pieces may take. Only what the very next batch needs
            may go past it, where samples differ in size more than the manifest tells.
        keeps: whether no piece is dropped.
        lock: the loader's; it guards all state.
        on_loaded: called under the lock when more can be decoded, or something went wrong.
        num_threads: that fetch.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        *,
        piece_bytes: int,
        keeps: bool,
        lock: threading.Lock,
        on_loaded: Callable[[], None],
        num_threads: int,
    ) -> None:
        self._dataset, self._plan = dataset, plan
        self._piece_bytes, self._keeps = piece_bytes, keeps
        self._lock, self._on_loaded = lock, on_loaded
        self._has_work = threading.Condition(lock)
        self._stretches: deque[tuple[Stretch, int]] = deque()  # and pieces new before each
        self._planned_end = self._requested_end = 0
        self._is_planning = False
        self._num_planned = 0  # pieces; they are numbered as they are planned
        self._to_fetch: deque[Piece] = deque()
        self._num_taken = 0  # pieces that some thread fetches or has fetched
        self._arrived: set[int] = set()
        self._num_loaded = 0  # all pieces before this number have arrived
        self._num_requested = 0  # the next batch needs the pieces before this number
        self._num_dropped = 0  # of the oldest stretch
        self._held_bytes = 0
        self._failure: tuple[int, BaseException] | None = None
        self._closed = False
        self.threads: Sequence[threading.Thread] = [
            threading.Thread(target=self._run, name=f"fetch-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()

    def is_loaded(self, end: int) -> bool:
        """Whether all samples before ``end`` can be decoded, or will never be."""
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
        """Drop the pieces that only samples before ``end`` needed."""
        while self._stretches:
            stretch, _ = self._stretches[0]
            if not self._keeps:
                self._drop(stretch, end)
            if stretch.end > end:
                return
            self._stretches.popleft()
            self._num_dropped = 0
            self._has_work.notify_all()

    def decode(self, begin: int, end: int, samples: NDArray[Any], labels: Indices | None) -> None:
        """Decode samples.

        Raises:
            DataError: one is bad, and the policy is to raise.
            StorageError: what fetching raised. So for all errors.
        """
        with self._lock:
            if self._failure is not None and (
                end > self._planned_end or self._fails(self._needed(end))
            ):
                raise self._failure[1]
            parts = [
                (stretch, max(begin, stretch.begin), min(end, stretch.end))
                for stretch, _ in self._stretches
                if stretch.begin < end and begin < stretch.end
            ]
        for stretch, first, last in parts:
            here = slice(first - stretch.begin, last - stretch.begin)
            self._dataset.decode(
                stretch.pieces,
                stretch.piece_of[here].tolist(),
                stretch.numbers[here].tolist(),
                range(first - begin, last - begin),
                samples,
                labels,
            )

    def close(self) -> None:
        """Tell the threads to end. One that hangs in storage does when that answers."""
        with self._lock:
            self._closed = True
            self._to_fetch.clear()
            self._stretches.clear()
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
        """What a thread should do now. Under the lock."""
        if self._closed or self._failure is not None:
            return None
        if group := self._next_group():
            return partial(self._fetch, group, self._num_taken - len(group))
        # At an epoch's end a stretch may be short, and a batch lie in three.
        is_due = len(self._stretches) < 2 and not self._to_fetch
        is_due = is_due or self._planned_end < self._requested_end
        if is_due and not self._is_planning:
            self._is_planning = True
            return self._plan_next
        return None

    def _next_group(self) -> list[Piece]:
        """The pieces that are needed next, as many as are fetched at once and as there is room."""
        group: list[Piece] = []
        group_bytes = 0
        while self._to_fetch:
            num_bytes = self._to_fetch[0].num_bytes
            fits = self._held_bytes + num_bytes <= self._piece_bytes
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
        stretch = self._plan.next()
        with self._lock:
            self._stretches.append((stretch, self._num_planned))
            self._to_fetch.extend(stretch.new)
            self._num_planned += len(stretch.new)
            self._planned_end = stretch.end
            self._is_planning = False
            self._on_loaded()
            self._has_work.notify_all()

    def _fetch(self, group: list[Piece], number: int) -> None:
        """Fetch pieces, the first of which has that number."""
        try:
            self._dataset.fetch(group, self._is_closed)
            self._arrive(group, number)
        except UserError as error:
            if len(group) == 1:
                self._fail(number, error)
                return
            for i, piece in enumerate(group):  # find out which of them it is
                self._fetch([piece], number + i)
        except Exception as error:
            self._fail(number, error)

    def _arrive(self, group: list[Piece], number: int) -> None:
        """Pieces are fetched, the first of which has that number."""
        with self._lock:
            if self._closed:
                return
            for piece in group:
                self._held_bytes += len(piece.data) - piece.num_bytes
                piece.num_bytes = len(piece.data)
            self._arrived.update(range(number, number + len(group)))
            while self._num_loaded in self._arrived:
                self._arrived.remove(self._num_loaded)
                self._num_loaded += 1
            self._on_loaded()

    def _drop(self, stretch: Stretch, end: int) -> None:
        before = self._held_bytes
        while self._num_dropped < len(stretch.pieces) and (
            stretch.last_used[self._num_dropped] < end
        ):
            piece = stretch.pieces[stretch.dropped[self._num_dropped]]
            self._held_bytes -= piece.num_bytes
            piece.data, piece.rows = b"", None
            self._num_dropped += 1
        if self._held_bytes < before:
            self._has_work.notify_all()

    def _needed(self, end: int) -> int:
        """How many pieces, as numbered, all samples before ``end`` need."""
        for stretch, before in reversed(self._stretches):
            if stretch.begin < end:
                return before + bisect_left(stretch.new_from, end)
        return 0

    def _fails(self, needed: int) -> bool:
        """Whether one of the pieces before that number could not be fetched."""
        return self._failure is not None and self._failure[0] < needed

    def _fail(self, number: int, error: BaseException) -> None:
        """Piece ``number`` can't be fetched. Those after it need not be: no batch passes it."""
        with self._lock:
            if self._failure is None or number < self._failure[0]:
                self._failure = number, error
            self._to_fetch.clear()
            self._on_loaded()
            self._has_work.notify_all()

    def _is_closed(self) -> bool:
        return self._closed
