"""Analytic model of one training step: computation, all-reduces, stragglers and data loading.

A phase is the slowest worker's forward and backward, its gradients sent bucket by bucket. A step is
Σ phases + overhead, or the time to load the data, if that is longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Algorithm = Literal["fastest", "ring", "tree", "hierarchical"]
Ready = Literal["early", "evenly", "late"]
Array = NDArray[np.float64]
Values = float | Array

# DistributedDataParallel's first bucket.
FIRST_BUCKET_BYTES = 2.0**20
_MOST_BUCKETS = 32
_PYRAMID = math.log(0.25) / math.log(0.75)  # 0.75^k = 0.25


class Link(NamedTuple):
    """Latency α and bandwidth β: m bytes take α + m / β."""

    latency_s: float
    bandwidth_bytes_per_s: float


def ring_s(num_bytes: float, workers: int, link: Link) -> float:
    """Seconds of a ring (Patarasuk and Yuan, 2009): 2 (p − 1) α + 2 (p − 1) / p · n / β."""
    steps = 2 * (workers - 1)
    return steps * link.latency_s + steps / workers * num_bytes / link.bandwidth_bytes_per_s


def tree_s(num_bytes: float, workers: int, link: Link) -> float:
    """Seconds of a tree all-reduce: 2 log₂(p) α + 2 n / β, in chunks (Sanders et al., 2009)."""
    if workers == 1:
        return 0.0
    depth = math.ceil(math.log2(workers))
    return 2 * depth * link.latency_s + 2 * num_bytes / link.bandwidth_bytes_per_s


def hierarchical_s(
    num_bytes: float, hosts: int, per_host: int, inside: Link, between: Link
) -> float:
    """Seconds of a reduce-scatter in each of h hosts of g workers, g rings, and an all-gather.

    The first and the last are a ring over g; between them, g rings over h hosts of n / g bytes
    each share the host's network, which is a ring of n bytes with (h − 1) instead of (p − 1) steps.
    """
    return ring_s(num_bytes, per_host, inside) + ring_s(num_bytes, hosts, between)


@dataclass(frozen=True)
class Topology:
    """Hosts of equal size, and the links inside a host and of a host, shared by its workers."""

    workers_per_host: int
    inside: Link
    between: Link
    algorithm: Algorithm = "fastest"

    def all_reduce_s(self, num_bytes: float, workers: int) -> float:
        if workers == 1 or not num_bytes:
            return 0.0
        hosts = math.ceil(workers / self.workers_per_host)
        # A flat ring or tree is as slow as its slowest link.
        link = self.inside if hosts == 1 else self.between
        per_host = min(workers, self.workers_per_host)
        options = {
            "ring": ring_s(num_bytes, workers, link),
            "tree": tree_s(num_bytes, workers, link),
            "hierarchical": hierarchical_s(num_bytes, hosts, per_host, self.inside, self.between),
        }
        return min(options.values()) if self.algorithm == "fastest" else options[self.algorithm]


class Parts(NamedTuple):
    """Components of a step's time; ``communication`` is what computation does not hide."""

    computation: Values
    overhead: Values
    communication: Values
    stragglers: Values
    data: Values

    @property
    def total(self) -> Values:
        return self.computation + self.overhead + self.communication + self.stragglers + self.data


@dataclass(frozen=True)
class Phase:
    """One player's part of the step; ``backward_share`` of it can hide communication."""

    seconds_per_sample: Values
    gradient_bytes: float = 0.0
    backward_share: float = 2 / 3
    ready: Ready = "evenly"

    def ready_at(self, share: float) -> float:
        """Share of the backward pass after which this share of the gradients is ready.

        In a pyramid of convolutions each level takes about as long as the next and has four times
        its parameters: a quarter of four levels holds three quarters of them.
        """
        share = round(share, 12)  # all gradients are ready at the end, not 1e-16 before it
        if self.ready == "early":
            return 1 - (1 - share) ** (1 / _PYRAMID)
        return share ** (1 / _PYRAMID) if self.ready == "late" else share


@dataclass(frozen=True)
class DataFlow:
    """Rates of data loading; None: unlimited. See :class:`~.sections.Data`."""

    bytes_per_sample: float
    storage_bytes_per_s: float | None
    host_bytes_per_s: float | None
    worker_samples_per_s: float | None
    workers_per_host: int

    def seconds(self, workers: int, local_batch: float) -> float:
        """Seconds until the samples of a step are loaded."""
        worker_bytes = local_batch * self.bytes_per_sample
        taken = [0.0]
        if self.storage_bytes_per_s is not None:
            taken.append(workers * worker_bytes / self.storage_bytes_per_s)
        if self.host_bytes_per_s is not None:
            per_host = min(workers, self.workers_per_host)
            taken.append(per_host * worker_bytes / self.host_bytes_per_s)
        if self.worker_samples_per_s is not None:
            taken.append(local_batch / self.worker_samples_per_s)
        return max(taken)


@dataclass(frozen=True)
class StepModel:
    """Parameters of a step.

    Attributes:
        deviation: Standard deviation of one worker's phase, as a share of it.
        topology: None if only ``exchange_s`` is known of the network.
        slowdown: Factor on the times of ``topology``.
        exchange_s: Exposed communication of two workers; p workers take 2 (p − 1) / p times this.
    """

    phases: tuple[Phase, ...]
    overhead_s: Values = 0.0
    deviation: Values = 0.0
    topology: Topology | None = None
    slowdown: Values = 1.0
    exchange_s: Values = 0.0
    bucket_bytes: float = 25 * 2**20
    overlap: bool = True
    data: DataFlow | None = None

    def parts(self, workers: int, local_batch: float) -> Parts:
        """Return the components of a step with ``local_batch`` samples on each worker."""
        computation: Values = 0.0
        communication: Values = 2 * (workers - 1) / workers * self.exchange_s
        slowest = 1 + self.deviation * expected_maximum(workers)
        for phase in self.phases:
            alone = phase.seconds_per_sample * local_batch
            computation = computation + alone
            backward = phase.backward_share * alone * slowest
            communication = communication + self._exposed_s(phase, workers, backward)
        stragglers = computation * (slowest - 1)
        busy = computation + self.overhead_s + communication + stragglers
        waiting: Values = 0.0 * busy
        if self.data is not None:
            waiting = np.maximum(0.0, self.data.seconds(workers, local_batch) - busy)
        return Parts(computation, self.overhead_s + 0.0 * busy, communication, stragglers, waiting)

    def _exposed_s(self, phase: Phase, workers: int, backward_s: Values) -> Values:
        """Seconds of communication after the backward pass.

        A bucket is sent once its gradients are ready and the one before has arrived, as PyTorch's
        DistributedDataParallel does (Li et al., 2020).
        """
        if self.topology is None or not phase.gradient_bytes or workers == 1:
            return 0.0 * backward_s
        if not self.overlap:
            return self.slowdown * self.topology.all_reduce_s(phase.gradient_bytes, workers)
        ready_bytes, arrived_s = 0.0, 0.0 * backward_s
        for num_bytes, count in buckets(phase.gradient_bytes, self.bucket_bytes):
            ready_bytes += num_bytes * count
            one_s = self.slowdown * self.topology.all_reduce_s(num_bytes, workers)
            ready_s = backward_s * phase.ready_at(min(1.0, ready_bytes / phase.gradient_bytes))
            arrived_s = np.maximum(ready_s, arrived_s) + count * one_s
        return arrived_s - backward_s


def buckets(num_bytes: float, bucket_bytes: float) -> list[tuple[float, int]]:
    """Return the size of each gradient bucket in sending order, and how many are sent at once.

    The first is small, so that sending starts early; the others are equal. Where there are very
    many, several are treated as one group, which does not change their sum.
    """
    first = min(num_bytes, bucket_bytes, FIRST_BUCKET_BYTES)
    rest = num_bytes - first
    if not rest:
        return [(first, 1)]
    count = math.ceil(rest / bucket_bytes)
    together = math.ceil(count / _MOST_BUCKETS)
    whole, left = divmod(count, together)
    made = [(first, 1), *([(rest / count, together)] * whole)]
    return [*made, (rest / count, left)] if left else made


@cache
def expected_maximum(count: int) -> float:
    """Return E[max] of ``count`` independent standard normal values; 0 for one.

    ∫₀^∞ (1 − Φ(x)ᵖ) dx − ∫₋∞⁰ Φ(x)ᵖ dx, by the trapezoid rule, which is exact to rounding for a
    smooth integrand that vanishes at both ends. √(2 ln p) is its upper bound.
    """
    if count == 1:
        return 0.0
    step = 2.0**-7
    below = np.exp(count * log_ndtr(np.arange(-12, 0 + step / 2, step)))
    above = -np.expm1(count * log_ndtr(np.arange(0, 12 + step / 2, step)))
    return float(np.trapezoid(above, dx=step) - np.trapezoid(below, dx=step))
