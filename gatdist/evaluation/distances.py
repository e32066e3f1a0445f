"""Distances between sets of feature vectors, computed by all workers together.

Legend: m real and n generated samples, d features. Every worker holds all features, computes its
share in float64, and returns the same result.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.parallel.communicator import Communicator

NUM_SPLITS = 5
SPLIT_SEED = 0
NUM_DIRECTIONS = 512
DIRECTIONS_SEED = 0
_MAX_ENTRIES = 2**24  # of a matrix of sample pairs at a time: 128 MiB


@dataclass(frozen=True)
class GaussianSums:
    """Sufficient statistics of a Gaussian fit, in float64."""

    count: Tensor  # n, []
    total: Tensor  # Σx, [d]
    outer: Tensor  # Σxxᵀ, [d, d]

    @classmethod
    def of(cls, features: Tensor) -> Self:
        x = features.double()
        return cls(x.new_full((), len(x)), x.sum(dim=0), x.T @ x)

    def reduced(self, comm: Communicator) -> Self:
        """Return the sums over all workers, by one all-reduce."""
        d = len(self.total)
        packed = torch.cat([self.count.view(1), self.total, self.outer.flatten()])
        packed = comm.all_reduce_(packed)
        return type(self)(packed[0], packed[1 : 1 + d], packed[1 + d :].view(d, d))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, [d, d]; needs two samples."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, in float64."""

    mean: Tensor
    covariance: Tensor


def frechet_distance(a: GaussianSums | Gaussian, b: GaussianSums | Gaussian) -> float:
    """Return the squared 2-Wasserstein distance of fitted Gaussians (Fréchet 1957; Heusel 2017).

    ::

        ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)

    The symmetric product under the root has the eigenvalues of Σ_a Σ_b, all real and ≥ 0, also
    where a covariance is singular. NaN if any feature is not finite.
    """
    mean = (a.mean - b.mean).square().sum()
    first, second = a.covariance, b.covariance
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(mean + first.trace() + second.trace() - 2 * cross)


def split_half_distance(features: Tensor) -> float:
    """Return the median Fréchet distance between halves of [n, d], n ≥ 4, over 5 fixed splits."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    distances = []
    for _ in range(NUM_SPLITS):
        halves = (features[half] for half in random_halves(len(features), generator))
        distances.append(frechet_distance(*map(GaussianSums.of, halves)))
        beat()
    return statistics.median(distances)


def random_halves(count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Split the indices below ``count`` in random halves, int64; fixed without a generator."""
    generator = generator or torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(count, generator=generator)
    return order[: count // 2], order[count // 2 :]


def self_similarity(x: Tensor, comm: Communicator) -> float:
    """Return the mean of k(x_i, x_j) over i ≠ j, of ``x`` [n, d], n ≥ 2.

    The kernel distance (KID) is the unbiased squared maximum mean discrepancy with the cubic kernel
    k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018), on all samples: the self-similarities of both
    sets less twice their :func:`cross_similarity`.
    """
    n, d = x.shape
    of_itself = ((x.double().square().sum(dim=1) / d + 1) ** 3).sum()
    return float((_kernel_sum(x, x, comm) - of_itself) / (n * (n - 1)))


def cross_similarity(x: Tensor, y: Tensor, comm: Communicator) -> float:
    """Return the mean of k over all pairs of ``x`` [m, d] and ``y`` [n, d]."""
    return float(_kernel_sum(x, y, comm) / (len(x) * len(y)))


def _kernel_sum(x: Tensor, y: Tensor, comm: Communicator) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    y = y.double()
    for _, block in _blocks(x, len(y), comm):
        total += ((block @ y.T / x.shape[1] + 1) ** 3).sum()
    return comm.all_reduce_(total)


def sliced_wasserstein(a: Tensor, b: Tensor, comm: Communicator) -> float:
    """Return the sliced 2-Wasserstein distance (Bonneel et al. 2015) of [m, d] and [n, d].

    Root mean square over 512 fixed directions of the distance between sorted projections; of sets
    of different sizes, at as many quantiles as the smaller has samples.
    """
    generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
    directions = torch.randn(a.shape[1], NUM_DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    mine = directions[:, comm.rank :: comm.world_size].to(a.device)
    count = min(len(a), len(b))
    places = (torch.arange(count, dtype=torch.float64, device=a.device) + 0.5) / count
    first, second = (
        (x.double() @ mine).sort(dim=0).values[(places * len(x)).long()] for x in (a, b)
    )
    total = comm.all_reduce_((first - second).square().mean(dim=0).sum())
    return float((total / NUM_DIRECTIONS).sqrt())


def _blocks(x: Tensor, num_columns: int, comm: Communicator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's rows of ``x`` in blocks: their indices, and the rows in float64."""
    rows = torch.arange(comm.rank, len(x), comm.world_size, device=x.device)
    mine = x[comm.rank :: comm.world_size].double()
    step = max(1, _MAX_ENTRIES // num_columns)
    for block in zip(rows.split(step), mine.split(step), strict=True):
        yield block
        beat()
