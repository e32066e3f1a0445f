"""The numbers of a run as Prometheus metrics, which Ray exports on each node for its processes.

The driver sets them, so that a series outlives the workers. Ray puts ``ray_`` before each name and
the node and process into labels; ours is ``run``, the run directory.

==================================== ============================================================
metric                               is
==================================== ============================================================
``gatdist_<tag>``                    a number of the last tick; see :func:`metric_name`
``gatdist_total_samples``            where the run ends
``gatdist_steps``                    steps made by the worker that has made the fewest
``gatdist_workers``                  that have told of themselves lately
``gatdist_workers_wanted``           the most that the run would take
``gatdist_checkpoint_samples``       samples seen by the last checkpoint
``gatdist_checkpoint_time_seconds``  when it was made, since 1970
``gatdist_launches_total``           of the workers, from the first
``gatdist_warnings_total``           that people were told
==================================== ============================================================
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from gatdist.cluster.watch import Heartbeat
from gatdist.config import Config, redact_url

PREFIX = "gatdist_"
# Beside those of a tick.
ABOUT = {
    "gatdist_steps": "Steps made by the worker that has made the fewest",
    "gatdist_workers": "Workers that have told of themselves lately",
    "gatdist_workers_wanted": "The most workers that the run would take",
    "gatdist_checkpoint_samples": "Samples seen by the last checkpoint",
    "gatdist_checkpoint_time_seconds": "When the last checkpoint was made, since 1970",
}
ABOUT_COUNTERS = {
    "gatdist_launches": "Launches of the workers",
    "gatdist_warnings": "Warnings that people were told",
}
_HEALTH, _LASTING = f"{PREFIX}health_", (f"{PREFIX}metric_", f"{PREFIX}time_evaluation_")
_SILENT_S = 10.0
# What is not set again is soon forgotten by Ray.
_REFRESH_S = 1.0


def metric_name(tag: str) -> str:
    """The metric's name for a tag: ``time/data_s`` becomes ``gatdist_time_data_seconds``."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", tag)
    name = re.sub(r"(?<=_per)_s(?=_|$)", "_second", name)
    return PREFIX + re.sub(r"_s$", "_seconds", name)


class Metrics:
    """Those of one run.

    Args:
        config: of the run.
        run_dir: its folder.
    """

    def __init__(self, config: Config, run_dir: str) -> None:
        self._run = {"run": redact_url(run_dir)}
        self._workers_requested = config.cluster.max_workers
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._refreshed = 0.0
        self._about = dict(ABOUT)
        self._of_ticks: set[str] = set()
        self._counters = {
            name: Counter(name, about, ("run",)) for name, about in ABOUT_COUNTERS.items()
        }

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Take note of what people are told; see :mod:`gatdist.monitor.console`."""
        if kind == "log":
            self._tick(fields)
        elif kind == "checkpoint":
            self._set("gatdist_checkpoint_samples", fields["samples_seen"])
            self._set("gatdist_checkpoint_time_seconds", time.time())
        elif kind == "warning":
            self._counters["gatdist_warnings"].inc(tags=self._run)

    def launch(self) -> None:
        """Workers are launched."""
        self._counters["gatdist_launches"].inc(tags=self._run)

    def look(self, heartbeats: Sequence[Heartbeat] = ()) -> None:
        """Take note of what workers tell of themselves. To be called all the time."""
        if time.monotonic() - self._refreshed < _REFRESH_S:
            return
        self._refreshed = time.monotonic()
        self._set(
            "gatdist_workers", sum(heartbeat.silent_s < _SILENT_S for heartbeat in heartbeats)
        )
        self._set("gatdist_workers_wanted", self._workers_requested)
        if heartbeats:
            self._set("gatdist_steps", min(heartbeat.step for heartbeat in heartbeats))
        for name, value in self._values.items():
            self._gauges[name].set(value, tags=self._run)

    def _tick(self, values: Mapping[str, Any]) -> None:
        numbers = {tag: v for tag, v in values.items() if isinstance(v, int | float)}
        self._about |= {metric_name(tag): f"{tag} of the last tick" for tag in numbers}
        found = {metric_name(tag): float(value) for tag, value in numbers.items()}
        for name in self._of_ticks - found.keys():
            if name.startswith(_HEALTH):  # an alarm that is over
                found[name] = 0.0
            elif not name.startswith(_LASTING):  # not one value was finite: it is shown no more
                self._values.pop(name, None)
        self._of_ticks |= found.keys()
        for name, value in found.items():
            self._set(name, value)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, self._about[name], ("run",))
        self._values[name] = value
        self._gauges[name].set(value, tags=self._run)
