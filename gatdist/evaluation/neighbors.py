"""Metrics that look at nearest neighbours among features, for what a distance of means can't tell.

Precision and recall are those of Kynkäänniemi et al. (2019), density and coverage those of Naeem et
al. (2020). A sample's ball reaches to its k-th nearest neighbour in its own set. Legend: m real and
n fake samples, d features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.parallel.communicator import Communicator

_MAX_ENTRIES = 2**24  # of a matrix of distances at a time
PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5


def radii(x: Tensor, k: int, comm: Communicator) -> Tensor:
    """The distance of each of ``x`` [n, d] to its k-th nearest other one, [n], alike everywhere.

    Where there are fewer than k others, to the farthest of them. All workers hold ``x``, n ≥ 2.
    """
    k = min(k, len(x) - 1)
    mine = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, distances in _distances(x, x, comm):
        # The nearest of all is the sample itself, or a copy of it: leave one zero out.
        mine[rows] = distances.topk(k + 1, dim=1, largest=False).values[:, k]
    return comm.all_reduce_(mine)


def precision_and_recall(real: Tensor, fake: Tensor, comm: Communicator) -> tuple[float, float]:
    """The share of fakes in some real sample's ball, and of real samples in some fake's.

    Args:
        real: [m, d], m ≥ 2.
        fake: [n, d], n ≥ 2.
        comm: the workers, who all hold both.
    """
    k = PRECISION_NEIGHBORS
    precision = _share_covered(fake, real, radii(real, k, comm), comm)
    return precision, _share_covered(real, fake, radii(fake, k, comm), comm)


def density_and_coverage(real: Tensor, fake: Tensor, comm: Communicator) -> tuple[float, float]:
    """How many real samples' balls a fake is in, over k, and the share of balls that hold a fake.

    Args:
        real: [m, d], m ≥ 2.
        fake: [n, d], n ≥ 2.
        comm: the workers, who all hold both.
    """
    k = min(DENSITY_NEIGHBORS, len(real) - 1)
    radius = radii(real, k, comm)
    counts = torch.zeros(2, dtype=torch.float64, device=real.device)
    for rows, distances in _distances(real, fake, comm):
        inside = distances <= radius[rows, None]
        counts += torch.stack([inside.sum(), inside.any(dim=1).sum()])
    in_balls, covered = comm.all_reduce_(counts).tolist()
    return in_balls / (k * len(fake)), covered / len(real)


def _share_covered(x: Tensor, centres: Tensor, radius: Tensor, comm: Communicator) -> float:
    """The share of ``x`` that lies in some ball."""
    count = torch.zeros((), dtype=torch.float64, device=x.device)
    for _, distances in _distances(x, centres, comm):
        count += (distances <= radius).any(dim=1).sum()
    return float(comm.all_reduce_(count)) / len(x)


def _distances(x: Tensor, y: Tensor, comm: Communicator) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share of the rows of ``x``: their numbers, and distances to all of ``y``."""
    step = max(1, _MAX_ENTRIES // len(y))
    mine = torch.arange(comm.rank, len(x), comm.world_size, device=x.device)
    y = y.double()
    for rows in mine.split(step):
        # Differences, not products: two copies must be at distance 0.
        mode = "donot_use_mm_for_euclid_dist"
        yield rows, torch.cdist(x[rows].double(), y, compute_mode=mode)
        beat()
