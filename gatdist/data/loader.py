"""Batches of one worker, read ahead in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.data.order import SampleOrder, local_positions

if TYPE_CHECKING:
    from gatdist.parallel.communicator import Communicator


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


class Loader:
    """Iterates over one worker's batches for ever, without epochs or short batches.

    One background thread reads ahead. What goes wrong there is raised by ``next``, in its turn,
    again and again. Use as a context manager, or call :meth:`close`.

    Args:
        dataset: read from.
        order: of its samples.
        global_batch: samples of all workers a step, a multiple of ``world_size``.
        rank: of this worker; it shows positions ``position + rank + world_size · i`` of each global
            batch.
        world_size: number of workers.
        position: samples shown globally so far.
        prefetch_batches: how many batches are read ahead.
        decode_threads: threads to decode with; 1 decodes in the background thread.
        pin_memory: put batches into page-locked memory, from which a GPU copies while it computes.
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
        prefetch_batches: int = 4,
        decode_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._order = dataset, order
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        self._pin_memory = pin_memory
        self._next_position = position
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._decoders = (
            ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
            if decode_threads > 1
            else None
        )
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(prefetch_batches):
            self._read_ahead()

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
            prefetch_batches=config.data.prefetch_batches,
            decode_threads=config.data.decode_threads,
            pin_memory=comm.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration  # closed
        batch = self._ahead[0].result()
        # Only now, so that a batch that failed fails again rather than being passed over.
        self._ahead.popleft()
        self._read_ahead()
        return batch

    def close(self) -> None:
        """End iteration and the threads. Waits for the batch that is just being read."""
        self._ahead.clear()
        self._reader.shutdown(cancel_futures=True)
        if self._decoders is not None:
            self._decoders.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _read_ahead(self) -> None:
        self._ahead.append(self._reader.submit(self._load, self._next_position))
        self._next_position += self._global_batch

    def _load(self, position: int) -> Batch:
        positions = local_positions(position, self._global_batch, self._rank, self._world_size)
        samples, labels = self._dataset.read(self._order.indices(positions), self._decoders)

        def to_tensor(array: NDArray[Any]) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory() if self._pin_memory else tensor

        return Batch(
            to_tensor(samples), None if labels is None else to_tensor(labels), to_tensor(positions)
        )


def to_network(samples: Tensor) -> Tensor:
    """Samples as networks take them.

    Args:
        samples: pixels, uint8 [n, H, W, C], or points, float [n, d].

    Returns:
        float32 [n, C, H, W] in [−1, 1]; points as they are.
    """
    if samples.dtype != torch.uint8:
        return samples
    return samples.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def to_pixels(images: Tensor) -> Tensor:
    """The inverse: uint8 [n, H, W, C] from floats [n, C, H, W], clamped to [−1, 1] and rounded."""
    levels = images.permute(0, 2, 3, 1).add(1.0).mul_(127.5).add_(0.5).floor_().clamp_(0, 255)
    return levels.to(torch.uint8).contiguous()
