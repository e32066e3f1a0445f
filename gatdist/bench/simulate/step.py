"""The model of one step: both players' phases, one after the other, and what each waits for.

::

    phase = forward + backward, the slowest worker's, with its gradients sent bucket by bucket
    step  = Σ phases + overhead        or, where the data are slower, the data's time

Everything is in seconds a step. Numbers may be arrays of one shape, for many variants at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import log_ndtr

from gatdist.bench.simulate.collectives import Topology, Values

# What DistributedDataParallel sends first.
FIRST_BUCKET_BYTES = 2.0**20
_MOST_BUCKETS = 32
_PYRAMID = math.log(0.25) / math.log(0.75)  # 0.75^k = 0.25

Ready = Literal["early", "evenly", "late"]


class Parts(NamedTuple):
    """Where the time of a step goes.

    Attributes:
        computation: that every worker does on its samples.
        overhead: that does not shrink with the batch.
        communication: for which computation waits; what is hidden behind it does not count.
        stragglers: waiting for the slowest worker.
        data: waiting for samples.
    """

    computation: Values
    overhead: Values
    communication: Values
    stragglers: Values
    data: Values

    @property
    def total(self) -> Values:
        """The step."""
        return self.computation + self.overhead + self.communication + self.stragglers + self.data


@dataclass(frozen=True)
class Phase:
    """One player's.

    Attributes:
        seconds_per_sample: forward and backward, of one worker.
        gradient_bytes: that are added up at its end.
        backward_share: of the phase, behind which they may travel.
        ready: when most of them are: ``evenly``, or ``early`` or ``late`` in the backward pass.
    """

    seconds_per_sample: Values
    gradient_bytes: float = 0.0
    backward_share: float = 2 / 3
    ready: Ready = "evenly"

    def ready_at(self, share: float) -> float:
        """The share of the backward pass after which this share of the gradients is ready.

        In a pyramid of convolutions each level takes about as long as the next and has four times
        its parameters: a quarter of four levels holds three quarters of them.
        """
        share = round(share, 12)  # of all, all is ready at the end; of all but 1e-16, not so
        if self.ready == "early":
            return 1 - (1 - share) ** (1 / _PYRAMID)
        return share ** (1 / _PYRAMID) if self.ready == "late" else share


@dataclass(frozen=True)
class DataFlow:
    """How samples come; see :class:`~gatdist.bench.simulate.sections.Data`. None: fast enough."""

    bytes_per_sample: float
    storage_bytes_per_s: float | None
    host_bytes_per_s: float | None
    worker_samples_per_s: float | None
    workers_per_host: int

    def seconds(self, workers: int, local_batch: float) -> float:
        """That the samples of a step take to come."""
        per_host = min(workers, self.workers_per_host) * local_batch * self.bytes_per_sample
        total = workers * local_batch * self.bytes_per_sample
        taken = [0.0]
        if self.storage_bytes_per_s is not None:
            taken.append(total / self.storage_bytes_per_s)
        if self.host_bytes_per_s is not None:
            taken.append(per_host / self.host_bytes_per_s)
        if self.worker_samples_per_s is not None:
            taken.append(local_batch / self.worker_samples_per_s)
        return max(taken)


@dataclass(frozen=True)
class StepModel:
    """What a step is made of.

    Attributes:
        phases: in their order.
        overhead_s: of a step, whatever the batch.
        deviation: of one worker's phase, as a share of it.
        topology: of the network; None where only ``exchange_s`` is known of it.
        slowdown: of the network, against ``topology``.
        exchange_s: for which two workers wait in a step; more of them wait as a ring's grows,
            by 2 (p − 1) / p.
        bucket_bytes: gradients that are sent together.
        overlap: whether they are sent while the rest of the backward pass is computed.
        data: None where it is fast enough.
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
        """A step of so many workers, ``local_batch`` samples each."""
        computation: Values = 0.0
        communication: Values = 2 * (workers - 1) / workers * self.exchange_s
        stretched = 1 + self.deviation * expected_maximum(workers)
        for phase in self.phases:
            alone = phase.seconds_per_sample * local_batch
            computation = computation + alone
            backward = phase.backward_share * alone * stretched
            communication = communication + self._exposed_s(phase, workers, backward)
        stragglers = computation * (stretched - 1)
        busy = computation + self.overhead_s + communication + stragglers
        waiting: Values = 0.0 * busy
        if self.data is not None:
            waiting = np.maximum(0.0, self.data.seconds(workers, local_batch) - busy)
        return Parts(computation, self.overhead_s + 0.0 * busy, communication, stragglers, waiting)

    def _exposed_s(self, phase: Phase, workers: int, backward_s: Values) -> Values:
        """For which a phase waits after its backward pass.

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
    """Sizes of gradient buckets in the order in which they are sent, and how many go at once.

    The first is small, so that sending begins early; the others are alike. Of very many, some go
    at once, which makes no difference to their sum.
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
    """E[max] of so many independent standard normal values; 0 for one.

    ∫₀^∞ (1 − Φ(x)ᵖ) dx − ∫₋∞⁰ Φ(x)ᵖ dx, by the trapezoid rule, which is exact to rounding for a
    smooth integrand that vanishes at both ends. √(2 ln p) is its bound from above.
    """
    if count == 1:
        return 0.0
    step = 2.0**-7
    below = np.exp(count * log_ndtr(np.arange(-12, 0 + step / 2, step)))
    above = -np.expm1(count * log_ndtr(np.arange(0, 12 + step / 2, step)))
    return float(np.trapezoid(above, dx=step) - np.trapezoid(below, dx=step))
