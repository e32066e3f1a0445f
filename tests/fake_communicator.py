"""A fake communicator whose workers all hold the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.parallel.communicator import LocalCommunicator


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
