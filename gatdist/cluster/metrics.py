"""A run's metrics for Prometheus, which Ray exports on each node for its processes.

The driver sets them, so that a series outlives the workers. Ray puts ``ray_`` before each name and
adds labels for the node and process; the label ``run`` is the run directory. Beside the metrics of
``ABOUT`` and ``ABOUT_COUNTERS``, each number of a log interval is one, named by
:func:`metric_name`; ``gatdist_total_samples`` is where the run ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from gatdist.cluster.policies import Heartbeat
from gatdist.config import Config, redact_url

PREFIX = "gatdist_"
ABOUT = {
    "gatdist_steps": "Steps made by the slowest worker",
    "gatdist_workers": "Workers that have sent a heartbeat recently",
    "gatdist_workers_wanted": "Largest number of workers that the run can use",
    "gatdist_workers_changes": "Changes of workers without a restart, so far",
    "gatdist_workers_steps_undone": "Steps that they undid, which were repeated, so far",
    "gatdist_workers_change_seconds": "Seconds that they took, so far",
    "gatdist_workers_lost_seconds": "Seconds that they and the undone steps took, so far",
    "gatdist_checkpoint_samples": "Samples seen by the last checkpoint",
    "gatdist_checkpoint_time_seconds": "Time of the last checkpoint, since the epoch",
}
ABOUT_COUNTERS = {
    "gatdist_launches": "Launches of the workers",
    "gatdist_warnings": "Warnings shown on the console",
}
_HEALTH, _LASTING = f"{PREFIX}health_", (f"{PREFIX}metric_", f"{PREFIX}time_evaluation_")
_SILENT_S = 10.0
_REFRESH_S = 1.0  # Ray soon forgets what is not set again


def metric_name(tag: str) -> str:
    """Return the name of a tag's metric: ``gatdist_time_data_seconds`` for ``time/data_s``."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", tag)
    name = re.sub(r"(?<=_per)_s(?=_|$)", "_second", name)
    return PREFIX + re.sub(r"_s$", "_seconds", name)


class Metrics:
    """Metrics of the run in ``run_dir``."""

    def __init__(self, config: Config, run_dir: str) -> None:
        self._run = {"run": redact_url(run_dir)}
        self._workers_requested = config.cluster.max_workers
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._refreshed = 0.0
        self._about = dict(ABOUT)
        self._logged: set[str] = set()
        self._counters = {
            name: Counter(name, about, ("run",)) for name, about in ABOUT_COUNTERS.items()
        }

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Update metrics from an event of :mod:`gatdist.monitor.console`."""
        if kind == "log":
            self._log(fields)
        elif kind == "checkpoint":
            self._set("gatdist_checkpoint_samples", fields["samples_seen"])
            self._set("gatdist_checkpoint_time_seconds", time.time())
        elif kind == "members":
            for tag, value in fields["totals"].items():
                self._set(metric_name(tag), value)
        elif kind == "warning":
            self._counters["gatdist_warnings"].inc(tags=self._run)

    def launch(self) -> None:
        """Count a launch of the workers."""
        self._counters["gatdist_launches"].inc(tags=self._run)

    def look(self, heartbeats: Sequence[Heartbeat] = ()) -> None:
        """Update metrics from heartbeats, and set all others again. To be called continuously."""
        if time.monotonic() - self._refreshed < _REFRESH_S:
            return
        self._refreshed = time.monotonic()
        self._set("gatdist_workers", sum(one.silent_s < _SILENT_S for one in heartbeats))
        self._set("gatdist_workers_wanted", self._workers_requested)
        if heartbeats:
            self._set("gatdist_steps", min(heartbeat.step for heartbeat in heartbeats))
        for name, value in self._values.items():
            self._gauges[name].set(value, tags=self._run)

    def _log(self, values: Mapping[str, Any]) -> None:
        numbers = {tag: v for tag, v in values.items() if isinstance(v, int | float)}
        for tag in numbers:
            self._about.setdefault(metric_name(tag), f"{tag} of the last log interval")
        found = {metric_name(tag): float(value) for tag, value in numbers.items()}
        for name in self._logged - found.keys():
            if name.startswith(_HEALTH):  # the alarm is over
                found[name] = 0.0
            elif not name.startswith(_LASTING):  # no value was finite: it is shown no more
                self._values.pop(name, None)
        self._logged |= found.keys()
        for name, value in found.items():
            self._set(name, value)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, self._about[name], ("run",))
        self._values[name] = value
        self._gauges[name].set(value, tags=self._run)
