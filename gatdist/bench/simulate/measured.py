"""Points and network figures from the JSON of ``bench step``, ``bench scaling`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatdist.bench.simulate.model import Link
from gatdist.bench.simulate.sections import Measured
from gatdist.common.errors import ConfigError, nearest
from gatdist.common.strict_json import parse_json

_COMMANDS = {"points": "bench scaling", "cases": "bench step", "network": "doctor --address"}


@dataclass(frozen=True)
class Timed:
    """Step time of a number of workers; ``alone_s``: of N independent processes."""

    workers: int
    global_batch: int
    step_s: float
    alone_s: float


@dataclass(frozen=True)
class Findings:
    """Contents of the files; ``points`` ascend in workers.

    ``gradient_bytes`` are reduced per step, ``shares`` are each player's part of it, ``link`` is
    fitted to all-reduces between hosts, ``most_on_a_host`` is the most workers that shared a host.
    """

    points: tuple[Timed, ...] = ()
    gradient_bytes: float | None = None
    shares: Mapping[str, float] | None = None
    link: Link | None = None
    most_on_a_host: int = 1

    @property
    def is_weak(self) -> bool:
        return len({point.global_batch / point.workers for point in self.points}) == 1

    def step_times(self, workers_per_host: int) -> list[float]:
        """Seconds of each measured step, as with ``workers_per_host`` workers on a host.

        Workers that are measured on one host share its cores and memory bandwidth. If each has the
        same batch, the slowdown of independent processes shows how much; it is subtracted.
        """
        if self.most_on_a_host <= workers_per_host or not self.is_weak:
            return [point.step_s for point in self.points]
        first = self.points[0].alone_s
        return [first + max(0.0, point.step_s - point.alone_s) for point in self.points]


def read(measured: Measured, folder: Path) -> Findings:
    """Read a scenario's files; ConfigError if one is unreadable or lacks a requested point."""
    points: list[Timed] = []
    gradient_bytes = shares = link = None
    most = 1
    if measured.scaling:
        curve = _curve(_load("scaling", folder / measured.scaling, "points"), measured)
        points = [_timed(point) for point in curve]
        gradient_bytes, shares = _gradient_bytes(curve), _shares(curve[0])
        most = max(max(point.get("hosts", {"": 1}).values()) for point in curve)
    elif measured.step:
        points = [_step(_load("step", folder / measured.step, "cases"), measured)]
    if measured.doctor:
        link = fitted_link(_load("doctor", folder / measured.doctor, "network"))
    return Findings(tuple(points), gradient_bytes, shares, link, most)


def _load(name: str, path: Path, needed: str) -> dict[str, Any]:
    key, value = f"measured.{name}", str(path)
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        rule, hint = f"can't be read ({error.strerror})", "Give its path from the scenario's folder"
        raise ConfigError(key, rule, value=value, hint=hint) from None
    except ValueError:
        raise ConfigError(key, "is not JSON", value=value) from None
    if not isinstance(found, dict) or not isinstance(found.get(needed), list) or not found[needed]:
        hint = f"Give the output of gatdist {_COMMANDS[needed]} --json"
        raise ConfigError(key, f"has no {needed}", value=value, hint=hint)
    return found


def _curve(found: Mapping[str, Any], measured: Measured) -> list[Mapping[str, Any]]:
    try:
        points = [p for p in found["points"] if p["mode"] == measured.mode]
        size = _chosen("measured.size", measured.size, [p["size"] for p in points])
        points = [p for p in points if p["size"] == size]
    except (KeyError, TypeError):
        raise _damaged("scaling") from None
    known = [p["workers"] for p in points]
    requested = measured.workers or known
    for workers in requested:
        _chosen("measured.workers", workers, known)
    return sorted((p for p in points if p["workers"] in requested), key=lambda p: p["workers"])


def _chosen(key: str, requested: Any, known: Sequence[Any]) -> Any:
    options = list(dict.fromkeys(known))
    if requested is None and len(options) == 1:
        return options[0]
    if requested not in options:
        hint = nearest(str(requested), map(str, options)) if options else "There is none"
        if requested is None:
            raise ConfigError(key, f"is required. {hint}")
        raise ConfigError(key, f"was not measured. {hint}", value=requested)
    return requested


def _timed(point: Mapping[str, Any]) -> Timed:
    try:
        batch = int(point["global_batch"])
        limit = float(point["limit_samples_per_s"])
        return Timed(int(point["workers"]), batch, float(point["step_s"]), batch / limit)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise _damaged("scaling") from None


def _gradient_bytes(curve: Sequence[Mapping[str, Any]]) -> float | None:
    """Each worker sends 2 (p − 1) / p of them."""
    for point in curve:
        workers = point["workers"]
        if workers > 1 and point.get("bytes_sent"):
            return float(point["bytes_sent"]) * workers / (2 * (workers - 1))
    return None


def _shares(point: Mapping[str, Any]) -> dict[str, float]:
    phases = point.get("phases") or {}
    players = {
        name: float(phases[name]) for name in ("discriminator", "generator") if name in phases
    }
    total = sum(players.values())
    return {name: seconds / total for name, seconds in players.items()} if total else {}


def _step(found: Mapping[str, Any], measured: Measured) -> Timed:
    try:
        cases = found["cases"]
        size = _chosen("measured.size", measured.size, [case["size"] for case in cases])
        cases = [case for case in cases if case["size"] == size]
        name = _chosen("measured.case", measured.case, [case["name"] for case in cases])
        (case,) = [case for case in cases if case["name"] == name]
        step_s = float(case["step_s"])
        # The batch is the speed times the step's time: medians, so not quite a whole number.
        bare = next((c for c in cases if c["name"] == "bare"), case)
        return Timed(1, round(bare["samples_per_s"] * bare["step_s"]), step_s, step_s)
    except (KeyError, TypeError, ValueError):
        raise _damaged("step") from None


def fitted_link(report: Mapping[str, Any]) -> Link:
    """Fit α and β to ring all-reduces between p hosts, by least relative squares.

    seconds = 2 (p − 1) α + 2 (p − 1) / p · n / β
    """
    try:
        workers = len(report["hosts"])
        sizes = np.array([one["bytes"] for one in report["network"]], dtype=np.float64)
        seconds = np.array([one["seconds"] for one in report["network"]], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise _damaged("doctor") from None
    if workers < 2 or len(sizes) < 2 or not (seconds > 0).all():
        rule = "needs all-reduces of several sizes between at least two hosts"
        raise ConfigError("measured.doctor", rule)
    from scipy.optimize import nnls

    steps = 2 * (workers - 1)
    columns = np.stack([np.full_like(sizes, steps), steps / workers * sizes], axis=1)
    (latency_s, per_byte), _ = nnls(columns / seconds[:, None], np.ones_like(seconds))
    return Link(float(latency_s), 1 / max(float(per_byte), 1e-13))


def _damaged(name: str) -> ConfigError:
    rule = "is not the output of the command"
    return ConfigError(f"measured.{name}", rule, hint="Measure again with --json")
