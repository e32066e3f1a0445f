"""Sections of a scenario that say how fast a step is. Units stand in the names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gatdist.bench.simulate.units import (
    BitsPerSecond,
    Bytes,
    BytesPerSecond,
    Count,
    Flop,
    FlopPerSecond,
    HostBytesPerSecond,
    Latency,
    Share,
    StepSeconds,
    Workers,
    between,
    refuse_both,
    share,
)
from gatdist.common.errors import ConfigError
from gatdist.config import Section


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


SecondsPer1000 = Annotated[float, between(1e-7, 1e7, "seconds", "Give seconds for 1,000 samples")]
Batches = Annotated[list[Count], BeforeValidator(_listed), Field(min_length=1)]


def _require_as_many(section: str, it: Observed | HeldOut) -> None:
    """Raise ConfigError unless there is a time for each count, and a batch for each or for all."""
    count = len(it.workers)
    lengths = {"seconds_per_1000_samples": {count}, "global_batch": {count, 1}}
    for name, fitting in lengths.items():
        values = getattr(it, name)
        if values is not None and len(values) not in fitting:
            raise ConfigError(
                f"{section}.{name}",
                f"must hold one for each of {section}.workers ({count})",
                value=values,
            )


class Observed(Section):
    """Points that somebody has timed; what is predicted is fitted to them.

    Attributes:
        workers: how many, each count once.
        seconds_per_1000_samples: of each count.
        global_batch: samples of all workers together, one number or one for each count.
        deviation: how far the times can be trusted, as a share of them.
    """

    workers: Annotated[list[Workers], Field(min_length=1)]
    seconds_per_1000_samples: Annotated[list[SecondsPer1000], Field(min_length=1)]
    global_batch: Batches | None = None
    deviation: Annotated[float, share(high=0.5)] = 0.01

    @model_validator(mode="after")
    def _alike(self) -> Self:
        _require_as_many("observed", self)
        if len(set(self.workers)) < len(self.workers):
            raise ConfigError("observed.workers", "must hold each count once", value=self.workers)
        return self


class HeldOut(Section):
    """Points that were timed and are not fitted to: how wrong the prediction of them is, is told.

    Attributes:
        workers: how many.
        seconds_per_1000_samples: of each count.
        global_batch: one number or one for each count, where it differs from what was observed.
    """

    workers: Annotated[list[Workers], Field(min_length=1)]
    seconds_per_1000_samples: Annotated[list[SecondsPer1000], Field(min_length=1)]
    global_batch: Batches | None = None

    @model_validator(mode="after")
    def _alike(self) -> Self:
        _require_as_many("held_out", self)
        return self


class Measured(Section):
    """Results of gatdist's own measurements: JSON files, by paths from the scenario's folder.

    Attributes:
        scaling: of ``gatdist bench scaling``; its counts of workers are the observed points.
        step: of ``gatdist bench step``; one observed point of one worker.
        doctor: of ``gatdist doctor --address``, for the network.
        size: which of the networks that were measured; may be left out where there is one.
        case: which of the cases of ``bench step``.
        mode: which curve of ``bench scaling``.
        workers: which of its counts are fitted to; all, where it is left out.
    """

    scaling: str | None = None
    step: str | None = None
    doctor: str | None = None
    size: str | None = None
    case: str = "alternating"
    mode: Literal["strong", "weak"] = "strong"
    workers: list[Workers] | None = None


class Predict(Section):
    """For which numbers of workers.

    Attributes:
        workers: ascending or not; the answers come in this order.
        global_batch: one number or one for each count, where it differs from what was observed.
    """

    workers: Annotated[list[Workers], Field(min_length=1)]
    global_batch: Batches | None = None

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if self.global_batch and len(self.global_batch) not in {1, len(self.workers)}:
            raise ConfigError(
                "predict.global_batch",
                f"must hold one for each of predict.workers ({len(self.workers)})",
                value=self.global_batch,
            )
        return self


class Player(Section):
    """What a step does for one player, all passes of its phase together.

    Attributes:
        seconds_per_sample: of one worker.
        flop_per_sample: instead of that, where ``[hardware]`` says how fast a worker is.
        share: of the step's work, where times were observed.
        parameters: whose gradients are sent, each of ``bytes_per_gradient``.
        backward_share: how much of the phase is the backward pass in which gradients become ready,
            behind which they travel. Left out: 2/3 of a network by itself. Of a pair, 0.4 of the
            generator's phase, most of which goes through the discriminator, and 0.3 of the
            discriminator's, whose gradients of real and fake samples are ready with the last pass.
        gradients_ready: when most gradients are, in the backward pass. Networks of pictures have
            most parameters where pictures are small: a discriminator's are ready early, as those of
            any classifier, and a generator's late. Left out, it is taken so.
    """

    seconds_per_sample: StepSeconds | None = None
    flop_per_sample: Flop | None = None
    share: Share | None = None
    parameters: Annotated[float, Field(ge=0, le=1e14)] = 0
    bytes_per_gradient: Annotated[float, Field(gt=0, le=8)] = 4.0
    backward_share: Share | None = None
    gradients_ready: Literal["early", "evenly", "late"] | None = None


class Workload(Section):
    """What is trained. One player is enough, for a network that has no opponent.

    Attributes:
        global_batch: samples a step, which all workers share.
        batch_per_worker: instead of that, samples of each: more workers make a larger batch.
        batch: which of both, where the number itself is not known.
        overhead_s: of a step, whatever the batch: launches, optimizers, the host's own work.
    """

    global_batch: Count | None = None
    batch_per_worker: Count | None = None
    batch: Literal["shared", "per_worker"] | None = None
    overhead_s: StepSeconds | None = None
    discriminator: Player | None = None
    generator: Player | None = None

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        refuse_both("workload", self, "global_batch", "batch_per_worker")
        message = {"global_batch": "shared", "batch_per_worker": "per_worker"}
        for key, kind in message.items():
            if getattr(self, key) is not None and self.batch not in (None, kind):
                raise ConfigError("workload.batch", f"contradicts workload.{key}", value=self.batch)
        return self


class Hardware(Section):
    """One worker's processor.

    Attributes:
        flop_per_s: its peak, in the type that is trained in.
        utilization: the share of it that training reaches.
    """

    flop_per_s: FlopPerSecond
    utilization: Share = 0.35


class Network(Section):
    """How gradients travel. ``bandwidth`` and ``latency`` are those between hosts, of a whole host.

    Attributes:
        algorithm: of the all-reduce; ``fastest`` takes the fastest for each message, as NCCL does.
        workers_per_host: how many share a host, and its network.
        efficiency: the share of the bandwidth that is reached.
        host_bandwidth_bytes_per_s: between the workers of one host, of each.
        bucket_bytes: gradients that are sent together.
        overlap: whether they are sent while the rest of the backward pass is computed.
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
    def _one_bandwidth(self) -> Self:
        refuse_both("network", self, "bandwidth_bytes_per_s", "bandwidth_bits_per_s")
        return self

    @property
    def bytes_per_s(self) -> float | None:
        """Of a host, as reached; None where nothing is said of it."""
        line = self.bandwidth_bytes_per_s
        if self.bandwidth_bits_per_s is not None:
            line = self.bandwidth_bits_per_s / 8
        return None if line is None else line * self.efficiency


class Stragglers(Section):
    """How unequal workers are: the deviation of one worker's phase, as a share of it."""

    deviation: Annotated[float, share(low=0.0)]


class Data(Section):
    """How samples come to the workers; what is slower than the steps holds them up.

    Attributes:
        bytes_per_sample: as stored.
        storage_bytes_per_s: that storage gives to all workers together.
        host_bytes_per_s: that reach one host.
        worker_samples_per_s: that one worker decodes.
    """

    bytes_per_sample: Annotated[float, between(1, 1e11, "bytes", "1 MB is 1e6")]
    storage_bytes_per_s: BytesPerSecond | None = None
    host_bytes_per_s: BytesPerSecond | None = None
    worker_samples_per_s: Annotated[float, Field(gt=0)] | None = None
