"""Whether all workers still hold the same state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.common.errors import WorkerLostError
from gatdist.parallel.communicator import Communicator

# An odd multiplier is invertible modulo 2⁶⁴, so that no single changed word goes unseen.
_MULTIPLIER = 6364136223846793005


@torch.no_grad()
def require_equal_replicas(tensors: Mapping[str, Tensor], comm: Communicator) -> None:
    """Compare checksums of all tensors over the workers, in one collective.

    Args:
        tensors: by name; the same names on every worker.
        comm: the workers.

    Raises:
        WorkerLostError: a tensor differs; the first is named, and a worker that holds it.
    """
    if comm.world_size == 1:
        return
    names = sorted(tensors)
    mine = torch.stack([_checksum(tensors[name]).to(comm.device) for name in names])
    rows = comm.all_gather(mine).cpu()  # [workers, tensors]
    for column, name in enumerate(names):
        for rank in range(1, comm.world_size):
            if rows[rank, column] != rows[0, column]:
                raise WorkerLostError(
                    f"worker {rank} holds another {name} than worker 0, though they compute alike. "
                    "A device, memory or network fault is likely: run gatdist doctor on its host. "
                    "The last checkpoint is good"
                )


def _checksum(tensor: Tensor) -> Tensor:
    """A number that changes with any byte and with their order, int64."""
    word = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
    words = tensor.detach().contiguous().view(-1).view(word).to(torch.int64)
    places = torch.arange(1, 2 * len(words), 2, device=words.device)
    return ((words + 1) * (places * _MULTIPLIER)).sum()
