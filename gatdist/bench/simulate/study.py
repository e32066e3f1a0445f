"""The answer to a scenario: step times, runs, costs, bottlenecks, and advice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gatdist.bench.simulate.measured import Findings, read
from gatdist.bench.simulate.runs import runs
from gatdist.bench.simulate.scenario import Scenario, dotted, load, spread
from gatdist.bench.simulate.sections import RECOVERY_RECORD, Goal
from gatdist.bench.simulate.speed import Point, Speed, speed

Points = Sequence[Mapping[str, Any]]


def simulate(source: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Answer a scenario.

    Args:
        source: Path of a ``.toml`` file, or the name of a scenario of the package.
        overrides: ``section.key=value``, as on the command line.

    Returns:
        JSON values. ``points``, one per entry of ``predict.workers``: ``workers``, ``hosts``,
        ``global_batch``, ``step_s`` (both None if the batch is unknown),
        ``seconds_per_1000_samples`` with its 80 % interval (``…_low``, ``…_high``),
        ``samples_per_s``, ``efficiency`` (relative to linear speedup), ``parts`` (shares of a step
        by name), ``bottleneck`` (the largest), ``largest_loss`` (the largest except computation;
        None without losses) and ``runs``: per ``market``, mean ``hours`` with the 80 % interval,
        ``goodput`` (share of the time in kept steps on all hosts), ``faults``, ``usd``,
        ``samples``, hours and dollars per million samples, ``parts``, ``bottleneck``,
        ``largest_loss``, ``checkpoint`` (intervals), ``after_loss`` and, if there are faults,
        ``recoveries``: goodput, ``seconds_per_1000_samples`` with faults, hours, dollars, parts
        and intervals with ``after_loss`` restart or continue, and the ``size`` fixed or elastic.
        ``observed``: fitted points with the fit's values. ``held_out``: other timed points with
        the relative ``error`` of their prediction. ``fit``: parameters with 80 % intervals, or
        None. ``advice``: the number of workers beyond which more stop paying, the fastest, the
        cheapest, and those that keep the deadline or budget. ``inputs``: every figure with its
        kind (measured, observed, published, assumed) and source. ``notes``: assumptions.

    Raises:
        ConfigError: The scenario can't be read, or a figure is unknown, missing or impossible.
    """
    return study(*load(source, overrides))


def study(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Answer a scenario whose paths are relative to ``folder``; see :func:`simulate`."""
    findings = read(scenario.measured, folder) if scenario.measured else Findings()
    made = speed(scenario, findings)
    alone = made.at(1)
    workers = scenario.predict.workers
    batches = spread(scenario.predict.global_batch, len(workers))
    points = [
        _point(scenario, made, alone, made.at(*count))
        for count in zip(workers, batches, strict=True)
    ]
    return {
        "scenario": scenario.name,
        "points": points,
        "observed": _observed(scenario, made),
        "held_out": _held_out(scenario, made),
        "fit": made.fit.parameters() if made.fit else None,
        "advice": advice(scenario.goal, points, alone.seconds_per_1000_samples),
        "inputs": inputs(scenario, findings),
        "notes": [*made.notes, *_notes(scenario, findings)],
    }


def _point(scenario: Scenario, made: Speed, alone: Point, point: Point) -> dict[str, Any]:
    seconds = point.seconds_per_1000_samples
    parts = {name: float(s) / point.step_s for name, s in point.parts._asdict().items()}
    low, high = (1000 * s / point.samples for s in point.range_s)
    return {
        "workers": point.workers,
        "hosts": -(-point.workers // scenario.workers_per_host),
        "global_batch": point.samples if made.batch.known else None,
        "step_s": point.step_s if made.batch.known else None,
        "seconds_per_1000_samples": seconds,
        "seconds_per_1000_samples_low": low,
        "seconds_per_1000_samples_high": high,
        "samples_per_s": 1000 / seconds,
        "efficiency": alone.seconds_per_1000_samples / (seconds * point.workers),
        "parts": parts,
        **_largest(parts),
        "runs": [_with_largest(run) for run in runs(scenario, made, point)],
    }


def _with_largest(run: Mapping[str, Any]) -> dict[str, Any]:
    recoveries = [one | _largest(one["parts"]) for one in run["recoveries"]]
    return {**run, **_largest(run["parts"]), "recoveries": recoveries}


def _largest(parts: Mapping[str, float]) -> dict[str, str | None]:
    losses = {name: share for name, share in parts.items() if name != "computation"}
    largest = max(losses, key=lambda name: losses[name])
    return {
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "largest_loss": largest if losses[largest] > 1e-9 else None,
    }


def _observed(scenario: Scenario, made: Speed) -> list[dict[str, Any]]:
    found = []
    for (workers, seconds), seen in zip(made.seen, made.observations, strict=True):
        assert made.fit is not None
        parts, _ = made.fit.predict(seen.workers, seen.local_batch)
        found.append(
            {
                "workers": workers,
                "seconds_per_1000_samples": seconds,
                "fitted_seconds_per_1000_samples": seconds * float(parts.total) / seen.step_s,
                "kind": "observed" if scenario.observed else "measured",
            }
        )
    return found


def _held_out(scenario: Scenario, made: Speed) -> list[dict[str, Any]]:
    points = scenario.held_out
    if points is None:
        return []
    batches = spread(points.global_batch, len(points.workers))
    found = []
    for workers, seconds, batch in zip(
        points.workers, points.seconds_per_1000_samples, batches, strict=True
    ):
        simulated = made.at(workers, batch).seconds_per_1000_samples
        found.append(
            {
                "workers": workers,
                "seconds_per_1000_samples": seconds,
                "simulated_seconds_per_1000_samples": simulated,
                "error": simulated / seconds - 1,
            }
        )
    return found


def inputs(scenario: Scenario, findings: Findings) -> list[dict[str, Any]]:
    """Return every figure that is used, with its kind and source."""
    found: list[dict[str, Any]] = []

    def add(key: str, value: Any, kind: str, source: str | None) -> None:
        found.append({"key": key, "value": value, "kind": kind, "source": source})

    if measured := scenario.measured:
        for point in findings.points:
            key = f"measured.{point.workers}_workers.step_s"
            add(key, point.step_s, "measured", measured.scaling or measured.step or "")
        for name, value in findings.link._asdict().items() if findings.link else ():
            add(f"measured.{name}", value, "measured", measured.doctor)
    given = dotted(scenario.model_dump(exclude_unset=True))
    unused = {"name", "sources", "predict", "measured", "simulation", "goal"}
    if scenario.run is None:
        unused |= {"checkpoints", "faults", "price", "spot"}
    if scenario.run is None or not (scenario.faults or scenario.spot):
        unused.add("recovery")
    for key, value in dotted(scenario.model_dump()).items():
        if _is_figure(value) and key.partition(".")[0] not in unused:
            add(key, value, *_source(scenario, key, key in given))
    return found


def _is_figure(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_figure, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _source(scenario: Scenario, key: str, given: bool) -> tuple[str, str]:
    name = key
    while name:
        if name in scenario.sources:
            kind, _, source = scenario.sources[name].partition(":")
            return kind.strip(), source.strip()
        name = name.rpartition(".")[0]
    if not given and key.startswith("recovery."):
        return "measured", f"default: {RECOVERY_RECORD}"
    if not given:
        return "assumed", "default"
    if key.startswith("observed."):
        return "observed", ""
    return "assumed", "given without a source"


def _notes(scenario: Scenario, findings: Findings) -> list[str]:
    notes = []
    if findings.most_on_a_host > scenario.workers_per_host:
        notes.append(
            f"{findings.most_on_a_host} workers were measured on one host, the scenario has "
            f"{scenario.workers_per_host} per host; their contention for the host is "
            f"{'subtracted' if findings.is_weak else 'part of the prediction'}"
        )
    unused = [name for name in ("price", "spot", "faults") if getattr(scenario, name)]
    if unused and scenario.run is None:
        notes.append(f"[{'], ['.join(unused)}]: unused without [run]")
    network = scenario.network
    line = network.bandwidth_bytes_per_s if network else None
    if line in {10e9, 25e9, 40e9, 50e9, 100e9, 200e9, 400e9}:
        notes.append(
            f"network.bandwidth_bytes_per_s = {line:g} is {8 * line / 1e9:g} Gbit/s; for "
            f"{line / 1e9:g} Gbit/s, set bandwidth_bits_per_s"
        )
    observed = scenario.observed
    if observed is not None:
        times = dict(zip(observed.workers, observed.seconds_per_1000_samples, strict=True))
        few, many = min(times), max(times)
        if times[many] > times[few]:
            notes.append(
                f"observed: {many} workers are slower than {few}; if these are samples per second, "
                "give 1000 / (samples per second)"
            )
        if network is None:
            notes.append("no network figures: communication is extrapolated from the points")
    return notes


def advice(goal: Goal, points: Points, alone_s: float) -> dict[str, Any]:
    """Choose numbers of workers; ``alone_s``: seconds for 1,000 samples on one worker."""
    market = cheapest_market(points)
    hours, usd = _of_market(points, market, "hours"), _of_market(points, market, "usd")
    times = _of_market(points, market, "hours_per_million_samples")
    costs = _of_market(points, market, "usd_per_million_samples")
    if market is None:
        times = {1: alone_s} | {p["workers"]: p["seconds_per_1000_samples"] for p in points}
    deadline, budget = goal.deadline_hours, goal.budget_usd
    in_time = [w for w, taken in hours.items() if deadline is not None and taken <= deadline]
    paid = [w for w, cost in usd.items() if budget is not None and cost <= budget]
    return {
        "market": market,
        "stops_paying": stops_paying(sorted(times.items()), goal.worth),
        "worth": goal.worth,
        "fastest": min(times, key=times.__getitem__, default=None),
        "cheapest": min(costs, key=costs.__getitem__, default=None),
        "fewest_in_time": min(in_time, default=None),
        "fastest_within_budget": min(paid, key=times.__getitem__, default=None),
    }


def stops_paying(curve: Sequence[tuple[int, float]], worth: float) -> int | None:
    """Return the number of workers beyond which another adds less than ``worth`` of one.

    Between neighbours a < b of the (workers, times) curve, each added worker adds (S(b) − S(a)) /
    (b − a) of one worker's speed at the smallest number, S being the speedup over it times that
    number.
    """
    for (a, a_s), (b, b_s) in pairwise(curve):
        smallest, unit_s = curve[0]
        if smallest * (unit_s / b_s - unit_s / a_s) / (b - a) < worth:
            return a
    return None


def cheapest_market(points: Points) -> str | None:
    """Return the market whose runs cost less; the first without prices, None without runs."""
    markets = dict.fromkeys(run["market"] for point in points for run in point["runs"])
    prices = {market: _of_market(points, market, "usd").values() for market in markets}
    # A market whose runs never end has fewer prices.
    return min(markets, key=lambda name: (-len(prices[name]), sum(prices[name])), default=None)


def _of_market(points: Points, market: str | None, key: str) -> dict[int, float]:
    return {
        point["workers"]: run[key]
        for point in points
        for run in point["runs"]
        if run["market"] == market and run[key] is not None
    }
