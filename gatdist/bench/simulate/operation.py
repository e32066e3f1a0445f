"""Sections of a scenario that say what befalls a run, and what it costs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gatdist.bench.simulate.units import (
    Bytes,
    BytesPerSecond,
    Count,
    Hours,
    Seconds,
    Share,
    Usd,
    Workers,
    between,
    refuse_both,
)
from gatdist.common.errors import ConfigError
from gatdist.config import Section


class Checkpoints(Section):
    """What a checkpoint costs, and how often one is made.

    Attributes:
        bytes: that are written.
        snapshot_s: for which the step stands still.
        write_bytes_per_s: at which it is written behind the back of training.
        write_s: instead of that.
        interval_s: of training between two; left out, the best that is found.
        interval_samples: instead of that, as ``run.checkpoint_every_samples``.
    """

    bytes: Bytes = 1e9
    snapshot_s: Seconds = 1.0
    write_bytes_per_s: BytesPerSecond = 2e8
    write_s: Seconds | None = None
    interval_s: Annotated[float, between(1e-3, 1e7, "seconds", "")] | None = None
    interval_samples: Count | None = None

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        refuse_both("checkpoints", self, "interval_s", "interval_samples")
        return self

    @property
    def written_after_s(self) -> float:
        """Seconds from the snapshot until the checkpoint counts."""
        return self.bytes / self.write_bytes_per_s if self.write_s is None else self.write_s


class Fault(Section):
    """Something that happens now and then, and stops all workers.

    Attributes:
        name: of it.
        of: to what it happens: each host, each worker, or the run as a whole.
        mtbf_hours: mean time between two, of one of those.
        detection_s: until it is noticed.
        restart_s: from then to the first new step.
        away_s: mean time until the host, or another in its place, can work again.
        notice_s: by which it is told before; enough for a checkpoint, and nothing is lost.
        loses_work: false where the run stands still and goes on, as when a network is away briefly.
    """

    name: Annotated[str, Field(min_length=1)]
    of: Literal["host", "worker", "run"] = "host"
    mtbf_hours: Hours
    detection_s: Seconds = 10.0
    restart_s: Seconds = 60.0
    away_s: Annotated[float, between(0, 1e7, "seconds", "")] = 0.0
    notice_s: Seconds = 0.0
    loses_work: bool = True


class Run(Section):
    """How long is trained.

    Attributes:
        total_samples: in all.
        undisturbed_hours: instead of that, hours of steps at each number of workers.
        min_workers: a run with fewer than all goes on, from so many on; left out, it waits.
        grow: whether a host that comes back is taken in at once, which takes a checkpoint and a
            restart (as ``gatdist train`` does), or when something else restarts the run.
    """

    total_samples: Count | None = None
    undisturbed_hours: Hours | None = None
    min_workers: Workers | None = None
    grow: Literal["at_once", "at_restarts"] = "at_once"

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.total_samples is None) == (self.undisturbed_hours is None):
            raise ConfigError(
                "run.total_samples", "one of this and run.undisturbed_hours must be given"
            )
        return self


class Price(Section):
    """What machines cost, started or not: the clock of the bill runs while a run recovers.

    Attributes:
        usd_per_host_hour: of one host with all its workers.
        head_usd_per_hour: of the machine of Ray's head and the driver, which nobody takes away.
        storage_usd_per_hour: of all that is kept.
    """

    usd_per_host_hour: Usd
    head_usd_per_hour: Usd = 0.0
    storage_usd_per_hour: Usd = 0.0


class Spot(Section):
    """The same hosts at a lower price, which may be taken away.

    Attributes:
        usd_per_host_hour: of one host.
        mtbf_hours: mean time until one host is taken.
        notice_s: by which that is told before.
        restart_s: from the checkpoint to the first new step.
        away_s: mean time until another host is there.
    """

    usd_per_host_hour: Usd
    mtbf_hours: Hours
    notice_s: Seconds = 120.0
    restart_s: Seconds = 60.0
    away_s: Annotated[float, between(0, 1e7, "seconds", "")] = 300.0


class Goal(Section):
    """What is wanted of it.

    Attributes:
        deadline_hours: by which it must be done.
        budget_usd: that it may cost.
        worth: adding workers pays while each brings at least this share of one.
    """

    deadline_hours: Hours | None = None
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    worth: Share = 0.5


class Simulation(Section):
    """Of runs with faults: how many are played, and from which seed."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 64
