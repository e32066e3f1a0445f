"""Communicators without processes: peers that hold the same tensors, and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from gatdist.parallel.communicator import LocalCommunicator

T = TypeVar("T")


class FakeCommunicator(LocalCommunicator):
    """Worker ``rank`` of ``world_size``; its peers hold the same tensors."""

    def __init__(self, rank: int, world_size: int, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.rank, self.world_size = rank, world_size

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.world_size)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None].expand(self.world_size, *tensor.shape).clone()

    def all_to_all(self, rows: Tensor) -> Tensor:
        return rows[self.rank].expand_as(rows).clone()


class _Threads:
    """Tensors that the workers of a :class:`ThreadCommunicator` exchange."""

    def __init__(self, world_size: int) -> None:
        self.barrier = Barrier(world_size, timeout=60)
        self.given: list[Tensor] = [torch.empty(0)] * world_size


class ThreadCommunicator(LocalCommunicator):
    """One of several workers that are threads of this process."""

    def __init__(self, rank: int, world_size: int, shared: _Threads) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        self._shared.given[self.rank] = tensor.clone()
        self._shared.barrier.wait()
        found = list(self._shared.given)
        self._shared.barrier.wait()
        return found

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchanged(tensor)).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchanged(tensor))

    def all_to_all(self, rows: Tensor) -> Tensor:
        return torch.stack([theirs[self.rank] for theirs in self._exchanged(rows)])


def on_workers(world_size: int, function: Callable[..., T], *args: Any) -> list[T]:
    """Run ``function(comm, *args)`` on as many threads; return the results by rank."""
    shared = _Threads(world_size)
    workers = [ThreadCommunicator(rank, world_size, shared) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return [f.result() for f in [pool.submit(function, comm, *args) for comm in workers]]
