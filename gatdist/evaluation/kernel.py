"""Kernel distance between sets of feature vectors.

The unbiased squared maximum mean discrepancy with the cubic polynomial kernel
k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018), on all samples::

    mean of k(x_i, x_j) over i≠j  +  mean of k(y_i, y_j) over i≠j  −  2 · mean of k(x_i, y_j)

that is :func:`self_similarity` of both sets less twice their :func:`cross_similarity`. The rows of
the kernel's matrix are shared among the workers. Legend: m and n samples, d features; in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.common.heartbeat import beat
from gatdist.parallel.communicator import Communicator

_MAX_ENTRIES = 2**24  # of the kernel's matrix at a time: 128 MiB


def self_similarity(x: Tensor, comm: Communicator) -> float:
    """Mean of k over all pairs of different rows of ``x`` [n, d], n ≥ 2, which all workers hold."""
    n, d = x.shape
    of_itself = ((x.double().square().sum(dim=1) / d + 1) ** 3).sum()
    return float((_kernel_sum(x, x, comm) - of_itself) / (n * (n - 1)))


def cross_similarity(x: Tensor, y: Tensor, comm: Communicator) -> float:
    """Mean of k over all pairs of rows of ``x`` [m, d] and ``y`` [n, d], which all workers hold."""
    return float(_kernel_sum(x, y, comm) / (len(x) * len(y)))


def _kernel_sum(x: Tensor, y: Tensor, comm: Communicator) -> Tensor:
    mine, y = x[comm.rank :: comm.world_size].double(), y.double()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    step = max(1, _MAX_ENTRIES // len(y))
    for start in range(0, len(mine), step):
        total += ((mine[start : start + step] @ y.T / x.shape[1] + 1) ** 3).sum()
        beat()
    return comm.all_reduce_(total)
