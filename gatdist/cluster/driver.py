"""What the driver of a run keeps from launch to launch, and how it reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray

from gatdist.cluster import policies
from gatdist.cluster.bridge import Bridge, Event
from gatdist.cluster.demand import Demand
from gatdist.cluster.metrics import Metrics
from gatdist.cluster.nodes import may_grow
from gatdist.config import Config
from gatdist.training.interrupts import Interrupts

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

# Assumed duration of a restart before one was measured.
_USUAL_START_S = 15.0


class Driver:
    """The driver of a run.

    Args:
        config: of the run.
        sizes: numbers of workers that may train, ascending.
        run_dir: URL of the run directory.
        console: shows events.
        log: Ray's log.
        interrupts: of this process.

    Attributes:
        needs: resources of each worker.
        bridge: to the workers of the present launch.
        metrics: for Prometheus.
        recovery: decides whether lost workers are tolerated.
        demand: what is requested from Ray's autoscaler.
        began_s: when the run began, on the monotonic clock.
        launches: number of launches so far.
        reached: samples seen by the newest checkpoint.
        disturbances: failures and preemption notices so far.
        left_s: seconds to the end of the run at the present speed; 0 if unknown.
        start_s: seconds that the last start took.
    """

    def __init__(
        self,
        config: Config,
        sizes: Sequence[int],
        run_dir: str,
        console: Console | None,
        log: Path,
        interrupts: Interrupts,
    ) -> None:
        self.sizes, self.run_dir, self.log = sizes, run_dir, log
        self._console, self._interrupts = console, interrupts
        joined = bool(config.cluster.address)  # a Ray that was started here has no autoscaler
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.needs = policies.needs_of(config.cluster, has, grows=joined and may_grow())
        self.config = config = policies.resolved(config, self.needs)
        self.bridge = Bridge()
        self.metrics = Metrics(config, run_dir)
        self.recovery = policies.Recovery(config.cluster.max_failures)
        grows = self.largest > sizes[0]
        self.demand = Demand(
            self.needs, config.cluster.labels, self.largest * joined, at_once=joined and grows
        )
        self.began_s = time.monotonic()
        self.launches = self.reached = self.disturbances = 0
        self.left_s, self.start_s = 0.0, _USUAL_START_S

    @property
    def continues(self) -> bool:
        """Whether a launch continues without lost workers."""
        return self.config.cluster.after_loss == "continue"

    @property
    def largest(self) -> int:
        """Number of workers that the run can use, with spares."""
        return self.sizes[-1] + self.config.cluster.spares

    @property
    def interrupted(self) -> bool:
        """Whether the user has asked for the end."""
        return self._interrupts.requested()

    def show(self, kind: str, fields: dict[str, Any]) -> None:
        """Show an event on the console and in the metrics."""
        self.metrics.event(kind, fields)
        if kind == "checkpoint":
            self.reached = fields["samples_seen"]
        if kind == "log":
            left = fields["total_samples"] - fields["samples_seen"]
            self.left_s = left / fields["throughput/samples_per_s"]
        if kind == "done" and fields["status"] == "interrupted" and not self.interrupted:
            return  # a pause between two launches, which was shown already
        if self._console:
            self._console.event(kind, fields)

    def show_all(self, events: Sequence[Event]) -> None:
        for kind, fields in events:
            self.show(kind, fields)

    def note(self, message: str) -> None:
        self.show("note", {"message": message})

    def warn(self, message: str) -> None:
        self.show("warning", {"message": message})
