"""Fréchet distance between sets of feature vectors, from sums that add up over workers.

Legend: n samples, d features.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.parallel.communicator import Communicator

HALVES_SPLITS = 5
HALVES_SEED = 0


@dataclass(frozen=True)
class GaussianSums:
    """What a Gaussian fit needs to know, in float64.

    Attributes:
        count: n, a tensor of no axes.
        total: Σx, [d].
        outer: Σxxᵀ, [d, d].
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The sums of ``features`` [n, d]."""
        x = features.double()
        return cls(x.new_full((), len(x)), x.sum(dim=0), x.T @ x)

    def reduced(self, comm: Communicator) -> Self:
        """The sums over all workers, in one collective."""
        d = len(self.total)
        packed = torch.cat([self.count.view(1), self.total, self.outer.flatten()])
        packed = comm.all_reduce_(packed)
        return type(self)(packed[0], packed[1 : 1 + d], packed[1 + d :].view(d, d))

    @property
    def mean(self) -> Tensor:
        """[d]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, [d, d]. Needs two samples."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: GaussianSums, b: GaussianSums) -> float:
    """Squared 2-Wasserstein distance of Gaussians fitted to two sets (Fréchet 1957; Heusel 2017).

    ::

        ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)

    The symmetric product under the root has the eigenvalues of Σ_a Σ_b, all of them real and at
    least 0, also where a covariance is singular.

    Returns:
        The distance (≥ 0 but for rounding); NaN if any feature is not finite.
    """
    mean = (a.mean - b.mean).square().sum()
    first, second = a.covariance, b.covariance
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    root = _square_root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(mean + first.trace() + second.trace() - 2 * cross)


def halves_distance(features: Tensor) -> float:
    """How far apart two random halves of one set are: what sampling alone makes of the distance.

    Args:
        features: [n, d], n ≥ 4.

    Returns:
        Median of :func:`frechet_distance` over 5 fixed splits.
    """
    generator = torch.Generator().manual_seed(HALVES_SEED)
    distances = []
    for _ in range(HALVES_SPLITS):
        halves = (features[half] for half in random_halves(len(features), generator))
        distances.append(frechet_distance(*map(GaussianSums.of, halves)))
        beat()
    return statistics.median(distances)


def random_halves(count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two halves of the numbers below ``count``, int64; always the same without a generator."""
    generator = generator or torch.Generator().manual_seed(HALVES_SEED)
    order = torch.randperm(count, generator=generator)
    return order[: count // 2], order[count // 2 :]


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues, [d, d]."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
