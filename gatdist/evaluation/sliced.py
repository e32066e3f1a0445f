"""Sliced Wasserstein distance between sets of features: of their projections to random lines."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.parallel.communicator import Communicator

NUM_DIRECTIONS = 512
DIRECTIONS_SEED = 0


def sliced_wasserstein(a: Tensor, b: Tensor, comm: Communicator) -> float:
    """Root mean square over directions of the 2-Wasserstein distance (Bonneel et al. 2015).

    Of one direction it is that between sorted projections; sets of different sizes are compared at
    as many quantiles as the smaller has samples.

    Args:
        a: [m, d].
        b: [n, d].
        comm: the workers, who all hold both and share the 512 fixed directions.
    """
    generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
    directions = torch.randn(a.shape[1], NUM_DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    mine = directions[:, comm.rank :: comm.world_size].to(a.device)
    count = min(len(a), len(b))
    places = (torch.arange(count, dtype=torch.float64, device=a.device) + 0.5) / count
    first, second = (_at_quantiles((x.double() @ mine).sort(dim=0).values, places) for x in (a, b))
    total = comm.all_reduce_((first - second).square().mean(dim=0).sum())
    return float((total / NUM_DIRECTIONS).sqrt())


def _at_quantiles(ordered: Tensor, places: Tensor) -> Tensor:
    """Of sorted numbers [n, k], those at ``places`` (in (0, 1), [q]) of each column, [q, k]."""
    return ordered[(places * len(ordered)).long()]
