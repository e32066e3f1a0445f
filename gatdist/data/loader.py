"""Batches of one worker, read ahead in the background."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.config import Config, DataConfig
from gatdist.data.dataset import Dataset
from gatdist.data.order import Indices, SampleOrder
from gatdist.data.reading.allotment import Allotment, allot
from gatdist.data.reading.buffers import Buffers
from gatdist.data.reading.plan import Plan
from gatdist.data.reading.sources import Decoded, Source, Stream

if TYPE_CHECKING:
    from gatdist.parallel.communicator import Communicator

# Opening a shard and asking for its bytes costs several round trips, if it is far away.
_FETCH_THREADS_FAR, _FETCH_THREADS_LOCAL = 16, 1
# A thread decodes at least so many samples in a row; to hand work over costs as much as one.
_FEWEST_IN_A_CHUNK = 8
# So often a worker that waits for data looks whether any has come.
_LOOK_S = 1.0
# Threads that hang in storage are left to end by themselves.
_CLOSE_S = 1.0


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch: n samples, as they are stored.

    Attributes:
        samples: uint8 [n, H, W, C] or float32 [n, d], on the CPU.
        labels: int64 [n]; None where there are no classes.
        positions: each sample's position in the run, int64 [n].
    """

    samples: Tensor
    labels: Tensor | None
    positions: Tensor


class _Work:
    """A batch that is being decoded."""

    def __init__(self, begin: int, end: int, samples: Tensor, labels: Indices | None) -> None:
        self.begin, self.end = begin, end
        self.samples, self.labels = samples, labels
        self.todo: deque[tuple[int, int]] = deque()  # chunks that no thread has begun
        self.num_undone = 0  # chunks
        self.batch: Batch | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether it can be taken, or raises."""
        return self.batch is not None or (self.error is not None and not self.num_undone)


class Loader:
    """Iterates over one worker's batches for ever, without epochs or short batches.

    Threads in the background fetch and decode ahead. What goes wrong there is raised by ``next``,
    in its turn, again and again. Use as a context manager, or call :meth:`close`.

    Args:
        dataset: read from.
        order: of its samples.
        global_batch: samples of all workers a step, a multiple of ``world_size``.
        rank: of this worker; it shows positions ``position + rank + world_size · i`` of each global
            batch.
        world_size: number of workers.
        position: samples shown globally so far.
        config: how many batches are read ahead (``prefetch_batches``), how many threads decode
            (``decode_threads``), and how much memory all of that may take (``memory_bytes``).
        pin_memory: put batches into page-locked memory, from which a GPU copies while it computes.

    Raises:
        ConfigError: the memory or the shared cache is too small.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        position: int,
        config: DataConfig,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._config = dataset, config
        self._local_batch = global_batch // world_size
        self._pin_memory = pin_memory
        self._lock = threading.Lock()
        self._can_decode = threading.Condition(self._lock)
        self._is_ready = threading.Condition(self._lock)
        self._ahead: deque[_Work] = deque()  # begun and not taken, in their order
        self._begun = 0  # samples
        self._failure: BaseException | None = None
        self._closed = False
        self._counted = {"data/bytes_fetched": 0, "data/cache_hits": 0}
        self._buffers = Buffers(
            lambda: dataset.new_samples(self._local_batch), config.prefetch_batches + 1
        )
        allotment = allot(dataset, order, config, global_batch=global_batch, world_size=world_size)
        self._plan = Plan(
            order,
            dataset.shard_sizes,
            position=position,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
            rows=allotment.rows,
            by_block=dataset.is_cached,
            keeps=allotment.keeps,
            least_bytes=allotment.least_bytes,
        )
        self._source = self._open(self._plan, order, allotment)
        self._threads = [
            threading.Thread(target=self._decode, name=f"decode-{i}", daemon=True)
            for i in range(config.decode_threads)
        ]
        for thread in self._threads:
            thread.start()

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
        """The loader of one worker of a run."""
        return cls(
            dataset,
            order,
            global_batch=config.step_samples,
            rank=comm.rank,
            world_size=comm.world_size,
            position=position,
            config=config.data,
            pin_memory=comm.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._lock:
            while not (self._closed or self._failure or (self._ahead and self._ahead[0].is_done)):
                before = self._dataset.bytes_fetched
                self._is_ready.wait(_LOOK_S)
                if self._dataset.bytes_fetched != before:
                    beat()
            if self._closed:
                raise StopIteration
            if self._failure:
                raise self._failure
            head = self._ahead[0]
            if head.error is not None:
                # It stays, so that a batch that failed fails again rather than being passed over.
                raise head.error
            self._ahead.popleft()
            self._can_decode.notify_all()
            assert head.batch is not None
            return head.batch

    def take_counts(self) -> dict[str, float]:
        """What was fetched since the last call, and how many batches are ready, by tag."""
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
        """End iteration and the threads. One that hangs in storage ends when that answers."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, plan: Plan, order: SampleOrder, allotment: Allotment) -> Source:
        dataset = self._dataset
        if dataset.is_decoded:
            return Decoded(dataset, order, plan)
        return Stream(
            dataset,
            plan,
            piece_bytes=allotment.piece_bytes,
            keeps=allotment.keeps,
            lock=self._lock,
            on_loaded=self._can_decode.notify_all,
            num_threads=_FETCH_THREADS_LOCAL if dataset.is_local else _FETCH_THREADS_FAR,
        )

    def _decode(self) -> None:
        """What each decoding thread does."""
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
        """What to decode next: of the newest batch if something of it is left, or of another."""
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
        if self._pin_memory:
            # PyTorch uses such memory again only after the copies that were begun from it.
            template = torch.from_numpy(self._dataset.new_samples(0))
            shape = (self._local_batch, *template.shape[1:])
            samples = torch.empty(shape, dtype=template.dtype, pin_memory=True)
        else:
            samples = torch.from_numpy(self._buffers.take())
        labels = self._dataset.new_labels(self._local_batch)
        work = _Work(self._begun, end, samples, labels)
        chunks = max(1, min(self._config.decode_threads, self._local_batch // _FEWEST_IN_A_CHUNK))
        bounds = [work.begin + self._local_batch * i // chunks for i in range(chunks + 1)]
        work.todo.extend(pairwise(bounds))
        work.num_undone = chunks
        return work

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
        positions = torch.from_numpy(self._plan.positions(work.begin, work.end))
        labels = None if work.labels is None else torch.from_numpy(work.labels)
        if self._pin_memory:
            positions = positions.pin_memory()
            labels = None if labels is None else labels.pin_memory()
        return Batch(work.samples, labels, positions)
