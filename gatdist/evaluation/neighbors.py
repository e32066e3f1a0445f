"""Metrics of nearest neighbors: precision and recall, density and coverage.

Legend: m real and n generated samples, d features. Every worker holds all features and computes the
rows of its samples.

Distances are compared as if they were computed in float64 from differences, so that the distance of
two copies is exactly 0. Most are only bounded, by matrix products in float32; those that the bounds
do not decide are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.parallel.communicator import Communicator

PRECISION_NEIGHBORS, DENSITY_NEIGHBORS = 3, 5
_MAX_ENTRIES = 2**24  # of a matrix at a time: 64 MiB in float32
_FEW_FEATURES = 16  # up to which computing all distances is as fast
_MORE_CANDIDATES = 8  # than neighbors, whose distances are computed
_MAX_COMPUTED = 1 / 16  # of a matrix; above, computing all distances is faster
_UNIT = 2.0**-24  # the relative error of rounding to float32
_TINIEST = 1e-30  # more than what is lost to underflow


def radii(x: Tensor, k: int, comm: Communicator) -> Tensor:
    """Return the distance of each of ``x`` [n, d], n ≥ 2, to its k-th nearest other sample, [n].

    With fewer than k others, to the farthest of them.
    """
    k = min(k, len(x) - 1)
    found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for block in _Pairs(x, x, comm).blocks():
        # The nearest is the sample itself, or a copy of it: skip one zero.
        found[block.rows] = block.smallest(k + 1)
    return comm.all_reduce_(found)


def precision_and_recall(real: Tensor, fake: Tensor, comm: Communicator) -> tuple[float, float]:
    """Return precision and recall of [m, d] and [n, d] (Kynkäänniemi et al. 2019); m, n ≥ 2.

    A sample's ball reaches to its 3rd nearest neighbor in its own set. Precision is the share of
    generated samples in some real sample's ball, recall the reverse.
    """
    k = PRECISION_NEIGHBORS
    precision = _share_covered(fake, real, radii(real, k, comm), comm)
    return precision, _share_covered(real, fake, radii(fake, k, comm), comm)


def density_and_coverage(real: Tensor, fake: Tensor, comm: Communicator) -> tuple[float, float]:
    """Return density and coverage of [m, d] and [n, d] (Naeem et al. 2020); m, n ≥ 2.

    A real sample's ball reaches to its 5th nearest real neighbor. Density is the mean number of
    balls that a generated sample is in, over 5; coverage the share of balls that contain one.
    """
    k = min(DENSITY_NEIGHBORS, len(real) - 1)
    radius = radii(real, k, comm)
    counts = torch.zeros(2, dtype=torch.float64, device=real.device)
    for block in _Pairs(real, fake, comm).blocks():
        inside = block.within(radius[block.rows, None])
        counts += torch.stack([inside.sum(), inside.any(dim=1).sum()])
    in_balls, covered = comm.all_reduce_(counts).tolist()
    return in_balls / (k * len(fake)), covered / len(real)


def _share_covered(x: Tensor, centers: Tensor, radius: Tensor, comm: Communicator) -> float:
    count = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in _Pairs(x, centers, comm).blocks():
        count += block.within(radius[None]).any(dim=1).sum()
    return float(comm.all_reduce_(count)) / len(x)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances of [..., m, d] and [..., n, d] from differences, float64 [..., m, n]."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _norms(x: Tensor) -> Tensor:
    return x.double().norm(dim=1).float()


class _Pairs:
    """This worker's samples ``x`` [m, d] and all ``y`` [n, d], block by block."""

    def __init__(self, x: Tensor, y: Tensor, comm: Communicator) -> None:
        self.x, self.y = x, y
        self._rows = torch.arange(comm.rank, len(x), comm.world_size, device=x.device)
        # About the mean, as products lose digits far from 0, and at most 1 in norm.
        self._center = y.double().mean(dim=0)
        sides = ((side, self._center) for side in (x, y))
        farthest = torch.stack([(s.double() - c).norm(dim=1).max() for s, c in sides]).max()
        self.scale = torch.where(farthest > 0, farthest, 1.0)
        self.near = self.rounded(y)
        self.near_norms = _norms(self.near)

    def rounded(self, x: Tensor) -> Tensor:
        return ((x.double() - self._center) / self.scale).float()

    def blocks(self) -> Iterator[_Exact | _Bounded]:
        candidates = DENSITY_NEIGHBORS + _MORE_CANDIDATES
        step = max(1, _MAX_ENTRIES // max(len(self.y), candidates * self.x.shape[1]))
        kind = _Exact if self.x.shape[1] <= _FEW_FEATURES else _Bounded
        for rows in self._rows.split(step):
            yield kind.of(self, rows)
            beat()


class _Exact(NamedTuple):
    """Some rows of the matrix of distances [r, n]."""

    rows: Tensor  # int64 [r]
    distances: Tensor

    @classmethod
    def of(cls, pairs: _Pairs, rows: Tensor) -> _Exact:
        return cls(rows, _distances(pairs.x[rows], pairs.y))

    def smallest(self, count: int) -> Tensor:
        """Return the ``count``-th smallest distance of each row, float64 [r]."""
        return self.distances.topk(count, dim=1, largest=False).values[:, -1]

    def within(self, radius: Tensor) -> Tensor:
        """Return which distances are at most ``radius`` [r, 1] or [1, n], bool [r, n]."""
        return self.distances <= radius


class _Bounded(NamedTuple):
    """As :class:`_Exact`, with bounds of squared distances, in units of ``pairs.scale``."""

    pairs: _Pairs
    rows: Tensor  # int64 [r]
    squared: Tensor  # about, float32
    error: Tensor  # at most, float32; both NaN if any feature is

    @classmethod
    def of(cls, pairs: _Pairs, rows: Tensor) -> _Bounded:
        here = pairs.rounded(pairs.x[rows])
        first, second = _norms(here)[:, None], pairs.near_norms[None]
        squared = first.square() + second.square()
        squared.addmm_(here, pairs.near.T, alpha=-2)
        # Of 2 x·y at most 2 d u |x| |y| ≤ d u (|x| + |y|)² / 2 in any order of summation (Higham
        # 2002, section 3.1). Twice that, and more than rounding of all else adds.
        factor = (here.shape[1] + 32) * _UNIT
        error = (first + second).square_().mul_(factor).add_(_TINIEST)
        return cls(pairs, rows, squared, error)

    def smallest(self, count: int) -> Tensor:
        pairs, lowest = self.pairs, self.squared - self.error
        num = min(lowest.shape[1], count + _MORE_CANDIDATES)
        bounds, candidates = lowest.topk(num, dim=1, largest=False)
        near = _distances(pairs.x[self.rows, None], pairs.y[candidates])[:, 0]
        found = near.topk(count, dim=1, largest=False).values[:, -1]
        if num < lowest.shape[1]:
            # Others are farther than the last candidate's lower bound.
            known = (found / pairs.scale).square() <= bounds[:, -1]
            if not known.all():
                found[~known] = _Exact.of(pairs, self.rows[~known]).smallest(count)
        return found

    def within(self, radius: Tensor) -> Tensor:
        pairs = self.pairs
        limit = (radius / pairs.scale).square().float()
        inside = self.squared + self.error <= limit
        unknown = (~inside & ~(self.squared - self.error > limit)).nonzero()
        if len(unknown) > _MAX_COMPUTED * inside.numel():
            return _Exact.of(pairs, self.rows).within(radius)
        radius = radius.expand(inside.shape)
        for i, j in (part.unbind(1) for part in unknown.split(_MAX_ENTRIES // pairs.x.shape[1])):
            found = _distances(pairs.x[self.rows[i], None], pairs.y[j, None])[:, 0, 0]
            inside[i, j] = found <= radius[i, j]
        return inside
