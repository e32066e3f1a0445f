"""Simulated runs of one number of workers: hours, their breakdown, cost, checkpoint interval."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gatdist.bench.simulate.faults import (
    Kind,
    Outcome,
    Situation,
    mean_and_spread,
    part_of,
    play,
)
from gatdist.bench.simulate.intervals import best_interval, daly_s
from gatdist.bench.simulate.model import Parts
from gatdist.bench.simulate.scenario import Scenario
from gatdist.bench.simulate.sections import Fault, Recovery, Run
from gatdist.bench.simulate.speed import Point, Speed
from gatdist.common.reliability import young_s

ON_DEMAND, SPOT = "on demand", "spot"
# Steps with fewer hosts are computed at so many points, and interpolated.
_SPEEDS = 9
# What is said of each way to recover.
_RECOVERY = (
    *("after_loss", "goodput", "seconds_per_1000_samples"),
    *("hours", "hours_low", "hours_high", "usd", "parts", "checkpoint"),
)


def runs(scenario: Scenario, speed: Speed, point: Point) -> list[dict[str, Any]]:
    """Simulate the run per market, see :func:`~.study.simulate`; [] without ``[run]``."""
    if scenario.run is None:
        return []
    markets = [ON_DEMAND, *([SPOT] if scenario.spot else [])]
    return [_of_market(scenario, scenario.run, speed, point, market) for market in markets]


def _of_market(
    scenario: Scenario, run: Run, speed: Speed, point: Point, market: str
) -> dict[str, Any]:
    """The run as it is, and ``recoveries``: all ways in which it could recover from faults."""
    as_it_is = _run(scenario, run, speed, point, market)
    situation = _situation(scenario, run, speed, point, market)
    if not situation.kinds:
        return as_it_is | {"recoveries": []}
    is_elastic = situation.min_hosts < situation.hosts
    sizes = {"fixed": None} | ({"elastic": run.min_workers} if is_elastic else {})
    recoveries = []
    for size, min_workers in sizes.items():
        for after_loss in ("restart", "continue"):
            is_it = after_loss == run.after_loss and is_elastic == (size == "elastic")
            other = run.model_copy(update={"min_workers": min_workers, "after_loss": after_loss})
            found = as_it_is if is_it else _run(scenario, other, speed, point, market)
            recoveries.append({"size": size} | {key: found[key] for key in _RECOVERY})
    return as_it_is | {"recoveries": recoveries}


def _run(scenario: Scenario, run: Run, speed: Speed, point: Point, market: str) -> dict[str, Any]:
    situation = _situation(scenario, run, speed, point, market)
    seed, repeats = scenario.simulation.seed, scenario.simulation.repeats
    checkpoint = _checkpoint(scenario, situation, point, seed)
    part, times = part_of(situation)
    interval_s = checkpoint["interval_s"] or part.work_s
    outcome = play(part, np.array([interval_s]), seed, repeats)
    # An unfinished run continues at the same rate; with next to no progress, it never ends.
    share = float(outcome.useful.mean()) / part.work_s
    ended, times = share > 0.02, times / max(share, 1e-9)
    hours = [s / 3600 for s in _with_step_error(point, mean_and_spread(outcome, times))]
    usd_per_hour = _usd_per_hour(scenario, situation.hosts, market)
    goodput = float(outcome.useful.sum() / outcome.total.sum())
    found: dict[str, Any] = {
        "market": market,
        "after_loss": run.after_loss,
        **{name: h if ended else None for name, h in zip(_named("hours"), hours, strict=True)},
        "goodput": goodput,
        "seconds_per_1000_samples": point.seconds_per_1000_samples / goodput if ended else None,
        "faults": _num_faults(situation, outcome, times),
        "parts": _parts(point.parts, outcome),
        "checkpoint": checkpoint,
        "played_share": min(1.0, 1 / times),
    }
    for name, h in zip(_named("usd"), hours, strict=True):
        found[name] = h * usd_per_hour if ended and usd_per_hour is not None else None
    millions = situation.work_s / point.seconds_per_1000_samples / 1000
    found["samples"] = round(1e6 * millions)
    for name in ("hours", "usd"):
        total = found[name]
        found[f"{name}_per_million_samples"] = None if total is None else total / millions
    return found


def _named(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _num_faults(situation: Situation, outcome: Outcome, times: float) -> float:
    """Simulated faults, or the expectation if there were few."""
    if outcome.faults.sum() > 1000:
        return float(outcome.faults.mean()) * times
    return situation.faults_per_s * float(outcome.total.mean()) * times


def _with_step_error(point: Point, times: tuple[float, float, float]) -> tuple[float, float, float]:
    """Mean and interval of a run, with the independent error of the step's time."""
    mean_s, low_s, high_s = times
    below, above = 1 - point.range_s[0] / point.step_s, point.range_s[1] / point.step_s - 1
    low = math.hypot(below, 1 - low_s / mean_s)
    high = math.hypot(above, high_s / mean_s - 1)
    return mean_s, mean_s * (1 - min(low, 1.0)), mean_s * (1 + high)


def _situation(scenario: Scenario, run: Run, speed: Speed, point: Point, market: str) -> Situation:
    per_host = scenario.workers_per_host
    hosts = math.ceil(point.workers / per_host)
    fewest = hosts if run.min_workers is None else math.ceil(run.min_workers / per_host)
    fewest = min(fewest, hosts)
    if run.undisturbed_hours is not None:
        work_s = run.undisturbed_hours * 3600
    else:
        assert run.total_samples is not None
        work_s = run.total_samples / 1000 * point.seconds_per_1000_samples
    checkpoints = scenario.checkpoints
    kinds = [_kind(fault, hosts, point.workers) for fault in scenario.faults]
    if market == SPOT:
        spot = scenario.spot
        assert spot is not None
        rate = hosts / (spot.mtbf_hours * 3600)
        # A preemption is announced, so it needs no detection.
        restart_s, away_s, notice_s = spot.restart_s, spot.away_s, spot.notice_s
        kinds.append(Kind("preemption", rate, True, 0.0, restart_s, away_s, notice_s))
    continues = run.after_loss == "continue"
    if continues:
        survived = partial(
            _survived, recovery=scenario.recovery, step_s=point.step_s, waits=fewest == hosts
        )
        kinds = [survived(kind) for kind in kinds]
    return Situation(
        work_s,
        hosts,
        fewest,
        _speeds(speed, point, per_host, hosts - fewest),
        checkpoints.snapshot_s,
        checkpoints.written_after_s,
        tuple(kinds),
        continues or run.grow == "at_once",
    )


def _survived(kind: Kind, recovery: Recovery, step_s: float, *, waits: bool) -> Kind:
    """The same fault, if the other workers continue, or wait for the replacement of those lost.

    In both cases they repeat a step, half of which was made on average.
    """
    if not (kind.loses_work and kind.grows_with_hosts):
        return kind
    away_s, continue_s, join_s = kind.away_s, recovery.change_s, recovery.join_s
    if not waits:
        away_s += recovery.replace_s
    elif away_s:
        join_s += recovery.replace_s
    else:
        continue_s = recovery.replace_s + join_s
    return replace(
        kind,
        detection_s=0.0 if kind.notice_s else kind.detection_s,
        away_s=away_s,
        continue_s=continue_s + step_s / 2,
        join_s=join_s,
    )


def _kind(fault: Fault, hosts: int, workers: int) -> Kind:
    many = {"host": hosts, "worker": workers, "run": 1}[fault.of]
    return Kind(
        fault.name,
        many / (fault.mtbf_hours * 3600),
        fault.of != "run",
        fault.detection_s,
        fault.restart_s,
        fault.away_s,
        fault.notice_s,
        fault.loses_work,
        hosts / workers if fault.of == "worker" else 1.0,
    )


def _speeds(speed: Speed, point: Point, per_host: int, most_away: int) -> tuple[float, ...]:
    """Relative speed with 0, 1, 2 … hosts away, at the same global batch."""
    if not most_away:
        return (1.0,)
    counts = np.unique(np.linspace(0, most_away, _SPEEDS).round().astype(int))
    computed = [
        point.step_s / speed.at(max(1, point.workers - int(away) * per_host), point.samples).step_s
        for away in counts
    ]
    found = np.interp(np.arange(most_away + 1), counts, computed)
    return tuple(float(one) for one in found / found[0])


def _checkpoint(
    scenario: Scenario, situation: Situation, point: Point, seed: int
) -> dict[str, Any]:
    """The interval that is used, and the best ones by formula and by simulation."""
    given, mtbf_s = scenario.checkpoints, situation.losing_mtbf_s
    found: dict[str, Any] = dict.fromkeys(
        ("interval_s", "best_s", "best_low_s", "best_high_s", "young_s", "daly_s")
    )
    if math.isfinite(mtbf_s):
        best = best_interval(situation, seed)
        found |= dict(zip(("best_s", "best_low_s", "best_high_s"), best, strict=True))
        found["young_s"] = young_s(given.snapshot_s, mtbf_s)
        found["daly_s"] = daly_s(given.snapshot_s, mtbf_s, situation.mean_restart_s)
        found["mtbf_hours"] = mtbf_s / 3600
    interval_s = given.interval_s or found["best_s"]
    if given.interval_samples is not None:
        interval_s = given.interval_samples * point.step_s / point.samples
    found["interval_s"] = interval_s
    for name in ("interval", "best"):
        seconds = found[f"{name}_s"]
        found[f"{name}_samples"] = (
            None if seconds is None else round(seconds / point.step_s * point.samples)
        )
    return found


def _parts(step: Parts, outcome: Outcome) -> dict[str, float]:
    total, whole = float(outcome.total.sum()), float(step.total)
    useful = float(outcome.useful.sum()) / total
    found = {name: useful * float(s) / whole for name, s in step._asdict().items()}
    more = {
        "hosts away": outcome.slower,
        "lost work": outcome.repeated,
        "checkpoints": outcome.snapshots,
        "restarts": outcome.standing,
    }
    return found | {name: float(values.sum()) / total for name, values in more.items()}


def _usd_per_hour(scenario: Scenario, hosts: int, market: str) -> float | None:
    price = scenario.price
    fixed = price.head_usd_per_hour + price.storage_usd_per_hour if price else 0.0
    if market == SPOT:
        assert scenario.spot is not None
        return fixed + hosts * scenario.spot.usd_per_host_hour
    return None if price is None else fixed + hosts * price.usd_per_host_hour
