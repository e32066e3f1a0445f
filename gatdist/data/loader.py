"""Batches of one worker, prefetched in background threads."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.common.cores import CORES_NEEDED, decode_threads, share_of_cores, whereabouts
from gatdist.common.heartbeat import beat
from gatdist.config import Config, DataConfig
from gatdist.data.dataset import Dataset
from gatdist.data.order import Indices, SampleOrder, WorkerShare
from gatdist.data.reading.plan import Plan
from gatdist.data.sources import Decoded, Stream, start_threads
from gatdist.parallel.communicator import Communicator

# Opening a remote shard and fetching its bytes takes several round trips.
_FETCH_THREADS_REMOTE, _FETCH_THREADS_LOCAL = 16, 1
# Samples that a thread decodes in a row, if there are enough; a hand-over costs as much as one.
_MIN_CHUNK = 8
_POLL_S = 1.0  # interval of heartbeats while waiting for data
_CLOSE_S = 1.0  # time to wait for threads, which may hang in storage


def _default_threads(dataset: Dataset, comm: Communicator) -> int:
    """Return how many threads decode unless configured; called by all workers."""
    # Steps on a CPU take all its cores; samples in memory take no decoding.
    if comm.device.type == "cpu" or dataset.is_decoded:
        return 1
    mine = whereabouts(socket.gethostname())
    cores = share_of_cores(mine, comm.all_gather_object(mine))
    if cores < CORES_NEEDED:
        dataset.notes.append(
            f"data.decode_threads: 1, since a worker on {mine['host']} may use {cores:.1f} cores"
        )
    return decode_threads(cores)


def _num_chunks(threads: int, local_batch: int, prefetch_batches: int) -> int:
    """Return the parts of a batch that threads decode; those read ahead keep all threads busy."""
    if threads == 1:
        return 1
    # Twice as many as threads, since some batches are complete and wait for the one before.
    needed = -(-2 * threads // prefetch_batches)
    return max(1, min(local_batch, max(needed, min(threads, local_batch // _MIN_CHUNK))))


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch: n samples, as stored."""

    samples: Tensor  # on the CPU; see :func:`~gatdist.data.modalities.new_samples`
    labels: Tensor | None  # int64 [n]; None if unlabelled
    positions: Tensor  # of each sample in the run, int64 [n]


class _Work:
    def __init__(self, begin: int, end: int, samples: Tensor, labels: Indices | None) -> None:
        self.begin, self.end = begin, end
        self.samples, self.labels = samples, labels
        self.todo: deque[tuple[int, int]] = deque()  # chunks not begun
        self.num_undone = 0  # chunks
        self.batch: Batch | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.batch is not None or (self.error is not None and not self.num_undone)


class Buffers:
    """Pool of up to ``most`` free arrays, since fresh memory costs a page fault every 4 KiB."""

    def __init__(self, make: Callable[[], NDArray[Any]], most: int) -> None:
        self._make = make
        self._free: deque[NDArray[Any]] = deque(maxlen=most)

    def take(self) -> NDArray[Any]:
        """Return an uninitialized array, whose memory is reused once it is no longer referenced."""
        memory = self._free.popleft() if self._free else self._make()
        array = memory[...]  # a view, which tensors made from it keep alive
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class Loader:
    """Endless iterator over one worker's batches, all of equal size.

    Background threads fetch and decode ahead. Their errors are raised by ``next`` at the batch
    concerned, and re-raised on every call. Use as a context manager, or call :meth:`close`.

    ``decode_threads`` is used unless configured. With ``pin_memory``, batches are in page-locked
    memory, which is reused once they are no longer referenced: keep them until copies have ended.
    Raises ConfigError if memory or the host cache are too small.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        share: WorkerShare,
        *,
        config: DataConfig,
        decode_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._config = dataset, config
        self._share = share
        self._local_batch = share.local_batch
        self._pin_memory = pin_memory
        num_threads = config.decode_threads or decode_threads
        self._num_chunks = _num_chunks(num_threads, self._local_batch, config.prefetch_batches)
        self._lock = threading.Lock()
        self._can_decode = threading.Condition(self._lock)
        self._is_ready = threading.Condition(self._lock)
        self._ahead: deque[_Work] = deque()  # begun and not taken, in order
        self._begun = 0  # samples
        self._failure: BaseException | None = None
        self._closed = False
        self._counted = {"data/bytes_fetched": 0, "data/cache_hits": 0}
        # Those read ahead, and one in use: no more exist, pinned or not.
        self._buffers = Buffers(self._new_samples, config.prefetch_batches + 1)
        budget = dataset.memory_budget(order, config, share)
        self._source: Decoded | Stream
        if dataset.is_decoded:
            self._source = Decoded(dataset, order, self._share)
        else:
            self._source = Stream(
                dataset,
                Plan(order, dataset.layout, budget, self._share, by_block=dataset.is_cached),
                budget,
                lock=self._lock,
                on_loaded=self._can_decode.notify_all,
                num_threads=_FETCH_THREADS_LOCAL if dataset.is_local else _FETCH_THREADS_REMOTE,
            )
        self._threads = start_threads("decode", self._decode, num_threads)

    @classmethod
    def for_worker(
        cls,
        dataset: Dataset,
        order: SampleOrder,
        config: Config,
        comm: Communicator,
        *,
        position: int,
    ) -> Self:
        return cls(
            dataset,
            order,
            WorkerShare.from_config(config, comm.rank, comm.world_size, position),
            config=dataset.config,
            decode_threads=_default_threads(dataset, comm),
            pin_memory=comm.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._lock:
            while not (self._closed or self._failure or (self._ahead and self._ahead[0].is_done)):
                before = self._dataset.bytes_fetched
                self._is_ready.wait(_POLL_S)
                if self._dataset.bytes_fetched != before:
                    beat()
            if self._closed:
                raise StopIteration
            if self._failure:
                raise self._failure
            head = self._ahead[0]
            if head.error is not None:  # it stays, to be raised again
                raise head.error
            self._ahead.popleft()
            self._can_decode.notify_all()
            assert head.batch is not None
            return head.batch

    def take_counts(self) -> dict[str, float]:
        """Return bytes fetched and cache hits since the last call, and ready batches, by tag."""
        now = {
            "data/bytes_fetched": self._dataset.bytes_fetched,
            "data/cache_hits": self._dataset.cache_hits,
        }
        counts = {tag: float(now[tag] - self._counted[tag]) for tag in now}
        self._counted = now
        with self._lock:
            ready = sum(work.is_done for work in self._ahead)
        return counts | {"data/ready_batches": float(ready)}

    def close(self) -> None:
        """End iteration and threads. A thread that hangs in storage ends when that answers."""
        with self._lock:
            self._closed = True
            self._ahead.clear()
            self._can_decode.notify_all()
            self._is_ready.notify_all()
        self._source.close()
        deadline = time.monotonic() + _CLOSE_S
        for thread in (*self._threads, *self._source.threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self) -> None:
        try:
            while True:
                with self._lock:
                    while (chunk := self._next_chunk()) is None and not self._closed:
                        self._can_decode.wait()
                if chunk is None:
                    return
                self._decode_chunk(*chunk)
        except BaseException as error:
            with self._lock:
                self._failure = error
                self._is_ready.notify_all()

    def _next_chunk(self) -> tuple[_Work, int, int] | None:
        if self._closed:
            return None
        if not self._ahead or not self._ahead[-1].todo:
            end = self._begun + self._local_batch
            if len(self._ahead) == self._config.prefetch_batches or not self._source.is_loaded(end):
                return None
            self._ahead.append(self._new_work(end))
            self._begun = end
        work = self._ahead[-1]
        return work, *work.todo.popleft()

    def _new_work(self, end: int) -> _Work:
        samples = torch.from_numpy(self._buffers.take())
        labels = self._dataset.new_labels(self._local_batch)
        work = _Work(self._begun, end, samples, labels)
        chunks = self._num_chunks
        bounds = [work.begin + self._local_batch * i // chunks for i in range(chunks + 1)]
        work.todo.extend(pairwise(bounds))
        work.num_undone = chunks
        return work

    def _new_samples(self) -> NDArray[Any]:
        if not self._pin_memory:
            return self._dataset.new_samples(self._local_batch)
        template = torch.from_numpy(self._dataset.new_samples(0))
        shape = (self._local_batch, *template.shape[1:])
        return torch.empty(shape, dtype=template.dtype, pin_memory=True).numpy()

    def _decode_chunk(self, work: _Work, begin: int, end: int) -> None:
        rows = slice(begin - work.begin, end - work.begin)
        labels = None if work.labels is None else work.labels[rows]
        error: BaseException | None = None
        try:
            self._source.decode(begin, end, work.samples.numpy()[rows], labels)
        except BaseException as found:
            error = found
        with self._lock:
            work.num_undone -= 1
            work.error = work.error or error
            if work.num_undone:
                return
        batch = None if work.error else self._batch(work)
        with self._lock:
            work.batch = batch
            self._is_ready.notify_all()
            undone = next((other for other in self._ahead if not other.is_done), None)
            self._source.release(undone.begin if undone else self._begun)

    def _batch(self, work: _Work) -> Batch:
        positions = torch.from_numpy(self._share.positions(work.begin, work.end))
        labels = None if work.labels is None else torch.from_numpy(work.labels)
        if self._pin_memory:
            positions = positions.pin_memory()
            labels = None if labels is None else labels.pin_memory()
        return Batch(work.samples, labels, positions)
