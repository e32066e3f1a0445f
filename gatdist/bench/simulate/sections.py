"""Sections of a scenario. Units are part of the names; figures out of range are refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from gatdist.bench.simulate.units import (
    Batches,
    BitsPerSecond,
    Bytes,
    BytesPerSecond,
    Count,
    Counts,
    Flop,
    FlopPerSecond,
    HostBytesPerSecond,
    Hours,
    Latency,
    LongSeconds,
    Seconds,
    Share,
    StepSeconds,
    Times,
    Usd,
    Workers,
    between,
    share,
)
from gatdist.common.errors import ConfigError
from gatdist.config import Section


def _refuse_both(section: str, it: BaseModel, one: str, other: str) -> None:
    if getattr(it, one) is not None and getattr(it, other) is not None:
        raise ConfigError(
            f"{section}.{other}",
            f"excludes {section}.{one}",
            value=getattr(it, other),
            hint="Keep one of them",
        )


def _require_lengths(section: str, it: Observed | HeldOut | Predict) -> None:
    count = len(it.workers)
    for name, fitting in (("seconds_per_1000_samples", {count}), ("global_batch", {count, 1})):
        values = getattr(it, name, None)
        if values is not None and len(values) not in fitting:
            raise ConfigError(
                f"{section}.{name}",
                f"must have one value per entry of {section}.workers ({count})",
                value=values,
            )


class Observed(Section):
    """Timed points to fit: seconds and batches of all workers together, one per count."""

    workers: Counts
    seconds_per_1000_samples: Times
    global_batch: Batches | None = None
    deviation: Annotated[float, share(high=0.5)] = 0.01

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_lengths("observed", self)
        if len(set(self.workers)) < len(self.workers):
            raise ConfigError("observed.workers", "must hold each count once", value=self.workers)
        return self


class HeldOut(Section):
    """Timed points that are not fitted; the error of their prediction is reported."""

    workers: Counts
    seconds_per_1000_samples: Times
    global_batch: Batches | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_lengths("held_out", self)
        return self


class Predict(Section):
    """Points to predict; ``global_batch`` is needed if it differs from the observed one."""

    workers: Counts
    global_batch: Batches | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_lengths("predict", self)
        return self


class Measured(Section):
    """JSON files of ``bench scaling``, ``bench step`` and ``doctor --address``.

    Paths are relative to the scenario's folder. Default ``workers``: all that were measured.
    """

    scaling: str | None = None
    step: str | None = None
    doctor: str | None = None
    size: str | None = None
    case: str = "alternating"
    mode: Literal["strong", "weak"] = "strong"
    workers: list[Workers] | None = None


class Player(Section):
    """Work of one player's phase.

    Attributes:
        seconds_per_sample: Forward and backward passes on one worker.
        flop_per_sample: Instead of seconds, with ``[hardware]``.
        share: Share of the step's work, if times were observed.
        parameters: Number of parameters whose gradients are sent.
        backward_share: Share of the phase that can hide communication. Default: 2/3 for a single
            network; for a pair, 0.4 for the generator and 0.3 for the discriminator, as most of the
            other passes come before the last one.
        gradients_ready: Default: early for a discriminator, late for a generator, as image networks
            have most parameters at low resolutions.
    """

    seconds_per_sample: StepSeconds | None = None
    flop_per_sample: Flop | None = None
    share: Share | None = None
    parameters: Annotated[float, Field(ge=0, le=1e14)] = 0
    bytes_per_gradient: Annotated[float, Field(gt=0, le=8)] = 4.0
    backward_share: Share | None = None
    gradients_ready: Literal["early", "evenly", "late"] | None = None


class Workload(Section):
    """What is trained; one player suffices for a network without an opponent.

    ``global_batch`` is shared by all workers; with ``batch_per_worker``, more workers make a larger
    batch. If the number is unknown, ``batch`` says which of the two it is.
    """

    global_batch: Count | None = None
    batch_per_worker: Count | None = None
    batch: Literal["shared", "per_worker"] | None = None
    overhead_s: StepSeconds | None = None
    discriminator: Player | None = None
    generator: Player | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_both("workload", self, "global_batch", "batch_per_worker")
        for key, kind in (("global_batch", "shared"), ("batch_per_worker", "per_worker")):
            if getattr(self, key) is not None and self.batch not in (None, kind):
                raise ConfigError("workload.batch", f"contradicts workload.{key}", value=self.batch)
        return self

    @property
    def samples(self) -> int | None:
        return self.global_batch or self.batch_per_worker


class Hardware(Section):
    """One worker's processor: its peak rate in the training dtype, and the share reached."""

    flop_per_s: FlopPerSecond
    utilization: Share = 0.35


class Network(Section):
    """The network of gradients; ``bandwidth`` and ``latency`` are of a host, ``host_…`` inside it.

    ``efficiency`` is the reached share of the bandwidth. The ``fastest`` algorithm picks one per
    message, as NCCL does.
    """

    algorithm: Literal["fastest", "ring", "tree", "hierarchical"] = "fastest"
    workers_per_host: Count = 1
    latency_s: Latency = 20e-6
    bandwidth_bytes_per_s: BytesPerSecond | None = None
    bandwidth_bits_per_s: BitsPerSecond | None = None
    efficiency: Share = 0.8
    host_latency_s: Latency = 5e-6
    host_bandwidth_bytes_per_s: HostBytesPerSecond | None = None
    bucket_bytes: Bytes = 25 * 2**20
    overlap: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_both("network", self, "bandwidth_bytes_per_s", "bandwidth_bits_per_s")
        return self

    @property
    def bytes_per_s(self) -> float | None:
        """Effective bandwidth of a host; None if it is not given."""
        line = self.bandwidth_bytes_per_s
        if self.bandwidth_bits_per_s is not None:
            line = self.bandwidth_bits_per_s / 8
        return None if line is None else line * self.efficiency


class Stragglers(Section):
    """Standard deviation of one worker's phase, as a share of it."""

    deviation: Annotated[float, share(low=0.0)]


class Data(Section):
    """Rates of data loading: of the storage, per host, and of decoding per worker."""

    bytes_per_sample: Annotated[float, between(1, 1e11, "bytes", "1 MB is 1e6")]
    storage_bytes_per_s: BytesPerSecond | None = None
    host_bytes_per_s: BytesPerSecond | None = None
    worker_samples_per_s: Annotated[float, Field(gt=0)] | None = None


class Checkpoints(Section):
    """Cost and interval of checkpoints.

    Attributes:
        snapshot_s: Seconds for which training stops.
        write_bytes_per_s: Rate at which it is written in the background; or give ``write_s``.
        interval_s: Seconds of training between two; default: the best that is found.
        interval_samples: Instead, as ``run.checkpoint_every_samples``.
    """

    bytes: Bytes = 1e9
    snapshot_s: Seconds = 1.0
    write_bytes_per_s: BytesPerSecond = 2e8
    write_s: Seconds | None = None
    interval_s: Annotated[float, between(1e-3, 1e7, "seconds")] | None = None
    interval_samples: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_both("checkpoints", self, "interval_s", "interval_samples")
        return self

    @property
    def written_after_s(self) -> float:
        """Seconds from the snapshot until the checkpoint is usable."""
        return self.bytes / self.write_bytes_per_s if self.write_s is None else self.write_s


class Fault(Section):
    """A fault that stops all workers.

    Attributes:
        of: What fails: each host, each worker, or the run as a whole, such as its driver. After a
            fault of a host or worker, the others may continue, see :class:`Recovery`.
        mtbf_hours: Mean time between failures of one of those.
        detection_s: Seconds until it is detected.
        restart_s: From then to the first new step, if all workers restart.
        away_s: Mean time until the host, or a replacement, can work again.
        notice_s: Advance notice; if it suffices for a checkpoint, no work is lost.
        loses_work: False if the run pauses and continues, as in a brief network outage.
    """

    name: Annotated[str, Field(min_length=1)]
    of: Literal["host", "worker", "run"] = "host"
    mtbf_hours: Hours
    detection_s: Seconds = 10.0
    restart_s: Seconds = 60.0
    away_s: LongSeconds = 0.0
    notice_s: Seconds = 0.0
    loses_work: bool = True


# Where the defaults of `Recovery` were measured, on hosts that share two cores.
RECOVERY_RECORD = "benchmarks/results/2026-12-01_after_loss"


class Recovery(Section):
    """Seconds of recovery if the other workers continue (``run.after_loss``).

    Attributes:
        change_s: From the detection of a loss until the others repeat the step in progress.
        replace_s: From when there is room for a replacement until it can join.
        join_s: For which all workers stop when it joins.
    """

    change_s: Seconds = 1.2
    replace_s: Seconds = 5.0
    join_s: Seconds = 0.1


class Run(Section):
    """Length of the run, and its number of workers.

    Attributes:
        total_samples: In all.
        undisturbed_hours: Instead, hours of steps at each number of workers.
        min_workers: Fewest workers to continue with; default: all.
        after_loss: Whether a lost worker or host makes all workers restart from the last
            checkpoint, or the others continue; see ``cluster.after_loss``.
        grow: If all workers restart, whether a host that returns joins at once, which takes a
            checkpoint and a restart (as in ``gatdist train``), or at the next restart.
    """

    total_samples: Count | None = None
    undisturbed_hours: Hours | None = None
    min_workers: Workers | None = None
    after_loss: Literal["restart", "continue"] = "continue"
    grow: Literal["at_once", "at_restarts"] = "at_once"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.total_samples is None) == (self.undisturbed_hours is None):
            rule = "one of this and run.undisturbed_hours is required"
            raise ConfigError("run.total_samples", rule)
        return self


class Price(Section):
    """Prices, also paid while a run recovers; the head is never a spot instance."""

    usd_per_host_hour: Usd
    head_usd_per_hour: Usd = 0.0
    storage_usd_per_hour: Usd = 0.0


class Spot(Section):
    """The same hosts as spot instances, see :class:`Price` and :class:`Fault`."""

    usd_per_host_hour: Usd
    mtbf_hours: Hours
    notice_s: Seconds = 120.0
    restart_s: Seconds = 60.0
    away_s: LongSeconds = 300.0


class Goal(Section):
    """Limits that advice keeps; adding workers pays while each adds ``worth`` of one worker."""

    deadline_hours: Hours | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    worth: Share = 0.5


class Simulation(Section):
    """Seed and number of simulated runs."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 64
