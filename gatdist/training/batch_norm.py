"""Statistics of batch normalization of the averaged generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gatdist.common.heartbeat import beat
from gatdist.common.seeding import generators_kept, seed_all
from gatdist.models.buffers import batch_norms, batch_statistics, buffers_kept, running_statistics
from gatdist.parallel.communicator import Communicator

if TYPE_CHECKING:  # a machine that only benchmarks steps has no fsspec
    from gatdist.runs import Sampler

NUM_BATCHES = 16  # as in BigGAN-PyTorch
MAX_BATCH = 256


@torch.no_grad()
def recompute(sampler: Sampler, batch: int, comm: Communicator) -> None:
    """Set the network's running statistics to means over 16 generated batches, in place.

    "Standing statistics" (Brock et al. 2019): each batch, of ``batch`` but at most 256 samples,
    is normalized by its own mean and variance. A function of weights, seed and stream; the
    workers share the batches, but each is computed by one. Collective.
    """
    network, size = sampler.network, min(batch, MAX_BATCH)
    norms = batch_norms(network)
    buffers = [tensor for norm in norms for tensor in running_statistics(norm)]
    if not norms:
        return
    width = sum(tensor.numel() for tensor in buffers)
    rows = torch.zeros(  # a batch each
        -(-NUM_BATCHES // comm.world_size), width, dtype=torch.float64, device=comm.device
    )
    with generators_kept(), buffers_kept(network), batch_statistics(norms) as found:
        for row, number in zip(rows, range(comm.rank, NUM_BATCHES, comm.world_size), strict=False):
            first = number * size
            seed_all(sampler.seed, f"{sampler.stream}/forward", first)
            positions = torch.arange(first, first + size, device=comm.device)
            latents, labels, noise = sampler.inputs(positions)
            network(latents, labels, *noise)
            row.copy_(torch.cat(found.take()))
            beat()
    # [W, rows, width] → [rows, W, width]: row i of worker r is batch i·W + r.
    batches = comm.all_gather(rows).transpose(0, 1).reshape(-1, width)[:NUM_BATCHES]
    means = batches.mean(0).split([tensor.numel() for tensor in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)
