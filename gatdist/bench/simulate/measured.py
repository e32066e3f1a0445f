"""Figures from the JSON files of ``gatdist bench step``, ``bench scaling`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatdist.bench.simulate.collectives import Link
from gatdist.bench.simulate.sections import Measured
from gatdist.common.errors import ConfigError, nearest
from gatdist.common.strict_json import parse_json


@dataclass(frozen=True)
class Timed:
    """One measured count of workers.

    Attributes:
        workers: how many.
        global_batch: samples of a step.
        step_s: seconds of it.
        alone_s: of as many workers that do not communicate; None where nobody measured it.
    """

    workers: int
    global_batch: int
    step_s: float
    alone_s: float | None


@dataclass(frozen=True)
class Findings:
    """What the files say.

    Attributes:
        points: by workers, ascending.
        gradient_bytes: that a step adds up; None where no two workers were measured.
        shares: of the step, of each player's phase, by its name; none where they were not measured.
        link: as an all-reduce between hosts sees it; None without the doctor's file.
        most_on_a_host: workers that shared one when they were measured.
    """

    points: tuple[Timed, ...] = ()
    gradient_bytes: float | None = None
    shares: Mapping[str, float] | None = None
    link: Link | None = None
    most_on_a_host: int = 1


def read(measured: Measured, folder: Path) -> Findings:
    """Read the files that a scenario names.

    Raises:
        ConfigError: a file can't be read, is of another command, or lacks what is asked for.
    """
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


def _load(key: str, path: Path, needed: str) -> dict[str, Any]:
    key = f"measured.{key}"
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            key,
            f"can't be read ({error.strerror})",
            value=str(path),
            hint="Give its path from the scenario's folder",
        ) from None
    except ValueError:
        raise ConfigError(key, "is not JSON", value=str(path)) from None
    if not isinstance(found, dict) or not isinstance(found.get(needed), list) or not found[needed]:
        command = {"points": "bench scaling", "cases": "bench step", "network": "doctor --address"}
        raise ConfigError(
            key,
            f"holds no {needed}",
            value=str(path),
            hint=f"Give what gatdist {command[needed]} --json printed",
        )
    return found


def _curve(found: Mapping[str, Any], measured: Measured) -> list[Mapping[str, Any]]:
    """The points of one size and mode, of the counts that are wanted, ascending."""
    try:
        points = [p for p in found["points"] if p["mode"] == measured.mode]
        size = _chosen("measured.size", measured.size, [p["size"] for p in points])
        points = [p for p in points if p["size"] == size]
    except (KeyError, TypeError):
        raise _damaged("scaling") from None
    requested = measured.workers or [p["workers"] for p in points]
    for workers in requested:
        _chosen("measured.workers", workers, [p["workers"] for p in points])
    return sorted((p for p in points if p["workers"] in requested), key=lambda p: p["workers"])


def _chosen(key: str, requested: Any, there: Sequence[Any]) -> Any:
    """``requested``, which must be there; the only one, where nothing is wanted."""
    options = list(dict.fromkeys(there))
    if requested is None and len(options) == 1:
        return options[0]
    if requested not in options:
        known = nearest(str(requested), map(str, options)) if options else "There is none"
        rule = "is required, of what was measured" if requested is None else "was not measured"
        raise ConfigError(
            key, f"{rule}. {known}", **({} if requested is None else {"value": requested})
        )
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
    """One worker's step of a case of ``bench step``."""
    try:
        cases = found["cases"]
        size = _chosen("measured.size", measured.size, [case["size"] for case in cases])
        cases = [case for case in cases if case["size"] == size]
        name = _chosen("measured.case", measured.case, [case["name"] for case in cases])
        (case,) = [case for case in cases if case["name"] == name]
        step_s = float(case["step_s"])
        # What it shows in a step is its speed times the step's time: medians, so not quite whole.
        bare = next((c for c in cases if c["name"] == "bare"), case)
        return Timed(1, round(bare["samples_per_s"] * bare["step_s"]), step_s, step_s)
    except (KeyError, TypeError, ValueError):
        raise _damaged("step") from None


def fitted_link(report: Mapping[str, Any]) -> Link:
    """α and β of the doctor's all-reduces between p hosts, as of a ring, by least relative squares.

    seconds = 2 (p − 1) α + 2 (p − 1) / p · n / β

    Raises:
        ConfigError: the report does not hold two message sizes between two hosts.
    """
    try:
        workers = len(report["hosts"])
        sizes = np.array([one["bytes"] for one in report["network"]], dtype=np.float64)
        seconds = np.array([one["seconds"] for one in report["network"]], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise _damaged("doctor") from None
    if workers < 2 or len(sizes) < 2 or not (seconds > 0).all():
        raise ConfigError(
            "measured.doctor", "holds no all-reduces of several sizes between two hosts or more"
        )
    from scipy.optimize import nnls

    steps = 2 * (workers - 1)
    columns = np.stack([np.full_like(sizes, steps), steps / workers * sizes], axis=1)
    (latency_s, per_byte), _ = nnls(columns / seconds[:, None], np.ones_like(seconds))
    return Link(float(latency_s), 1 / max(float(per_byte), 1e-13))


def _damaged(key: str) -> ConfigError:
    return ConfigError(
        f"measured.{key}", "is not what the command printed", hint="Measure again with --json"
    )
