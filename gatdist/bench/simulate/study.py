"""The answer to a scenario: times, efficiency, goodput, money, bottlenecks, and where it stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gatdist.bench.simulate.advice import advice
from gatdist.bench.simulate.loading import load
from gatdist.bench.simulate.measured import Findings, read
from gatdist.bench.simulate.runs import runs
from gatdist.bench.simulate.scenario import Scenario, dotted, spread
from gatdist.bench.simulate.speed import Point, Speed, shares_none, speed


def simulate(source: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Answer a scenario.

    Args:
        source: the path of a ``.toml`` file, or the name of a scenario of the package.
        overrides: ``section.key=value``, as on the command line.

    Returns:
        JSON values. ``points``, one for each of ``predict.workers``: ``workers``, ``hosts``,
        ``global_batch``, ``step_s`` (both None where the batch is not known),
        ``seconds_per_1000_samples`` and the range that holds it with a chance of eight tenths
        (``…_low``, ``…_high``), ``samples_per_s``, ``efficiency`` (of as many single
        workers), ``parts`` (shares of a step by name), ``bottleneck`` (the largest of them),
        ``largest_loss`` (the largest but computation; None where nothing is lost) and ``runs``:
        of each ``market``, mean ``hours`` with the range of eight tenths of runs, ``goodput`` (the
        share of the time that went into steps of all hosts whose result was kept), ``faults``,
        ``usd``, ``samples``, hours and dollars for a million of them, ``parts``, ``bottleneck``,
        ``largest_loss`` and ``checkpoint`` (intervals).
        ``observed``: what was fitted to, and how well; ``held_out``: what was not, with the
        ``error`` of its prediction, as a share. ``fit``: parameters with their ranges, or
        None. ``advice``: where adding workers stops paying, the fastest, the cheapest, and what
        keeps the deadline or the budget. ``inputs``: each figure with its kind (measured, observed,
        published, assumed) and source. ``notes``: what was taken for granted.

    Raises:
        ConfigError: the scenario can't be read, or a figure is unknown, missing or impossible.
    """
    scenario, folder = load(source, overrides)
    return study(scenario, folder)


def study(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """As :func:`simulate`, of a scenario whose paths count from ``folder``.

    Raises:
        ConfigError: a measured file can't be used, or figures do not go together.
    """
    findings = read(scenario.measured, folder) if scenario.measured else Findings()
    made = speed(scenario, findings)
    alone = made.at(1)
    counts = zip(scenario.predict.workers, _batches(scenario), strict=True)
    points = [_point(scenario, made, alone, made.at(*count)) for count in counts]
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


def _batches(scenario: Scenario) -> Sequence[int | None]:
    return spread(scenario.predict.global_batch, len(scenario.predict.workers))


def _point(scenario: Scenario, made: Speed, alone: Point, point: Point) -> dict[str, Any]:
    seconds = point.seconds_per_1000_samples
    parts = {name: float(s) / point.step_s for name, s in point.parts._asdict().items()}
    low, high = (1000 * s / point.samples for s in point.range_s)
    played = [run | _judged(run["parts"]) for run in runs(scenario, made, point)]
    return {
        "workers": point.workers,
        "hosts": -(-point.workers // scenario.workers_per_host),
        "global_batch": point.samples if made.batch.message else None,
        "step_s": point.step_s if made.batch.message else None,
        "seconds_per_1000_samples": seconds,
        "seconds_per_1000_samples_low": low,
        "seconds_per_1000_samples_high": high,
        "samples_per_s": 1000 / seconds,
        "efficiency": alone.seconds_per_1000_samples / (seconds * point.workers),
        "parts": parts,
        **_judged(parts),
        "runs": played,
    }


def _judged(parts: Mapping[str, float]) -> dict[str, str | None]:
    """The largest part by name, and the largest that is no computation."""
    losses = {name: share for name, share in parts.items() if name != "computation"}
    largest = max(losses, key=lambda name: losses[name])
    return {
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "largest_loss": largest if losses[largest] > 1e-9 else None,
    }


def _observed(scenario: Scenario, made: Speed) -> list[dict[str, Any]]:
    """What was fitted to, beside what the fit says of it."""
    kind = "observed" if scenario.observed else "measured"
    found = []
    for (workers, seconds), seen in zip(made.seen, made.observations, strict=True):
        assert made.fit is not None
        parts, _ = made.fit.predict(seen.workers, seen.local_batch)
        fitted = seconds * float(parts.total) / seen.step_s
        found.append(
            {
                "workers": workers,
                "seconds_per_1000_samples": seconds,
                "fitted_seconds_per_1000_samples": fitted,
                "kind": kind,
            }
        )
    return found


def _held_out(scenario: Scenario, made: Speed) -> list[dict[str, Any]]:
    """What was timed and not fitted to, beside the prediction of it."""
    message = scenario.held_out
    if message is None:
        return []
    found = []
    samples = spread(message.global_batch, len(message.workers))
    for workers, seconds, batch in zip(
        message.workers, message.seconds_per_1000_samples, samples, strict=True
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
    """Every figure that went in, with its kind and where it comes from."""
    found = [
        {
            "key": f"measured.{point.workers}_workers.step_s",
            "value": point.step_s,
            "kind": "measured",
            "source": _file(scenario),
        }
        for point in findings.points
    ]
    if findings.link is not None:
        message = findings.link._asdict()
        file = scenario.measured.doctor if scenario.measured else ""
        found += [
            {"key": f"measured.{key}", "value": value, "kind": "measured", "source": file}
            for key, value in message.items()
        ]
    given = dotted(scenario.model_dump(exclude_unset=True))
    unused = {"name", "sources", "predict", "measured", "simulation", "goal"}
    if scenario.run is None:
        unused |= {"checkpoints", "faults", "price", "spot"}
    for key, value in dotted(scenario.model_dump()).items():
        if _is_figure(value) and key.partition(".")[0] not in unused:
            kind, source = _source(scenario, key, key in given)
            found.append({"key": key, "value": value, "kind": kind, "source": source})
    return found


def _is_figure(value: Any) -> bool:
    """A number, or several."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_figure, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _source(scenario: Scenario, key: str, given: bool) -> tuple[str, str]:
    """Of the key itself, or of a table that it stands in."""
    name = key
    while name:
        if name in scenario.sources:
            kind, _, source = scenario.sources[name].partition(":")
            return kind.strip(), source.strip()
        name = name.rpartition(".")[0]
    if not given:
        return "assumed", "default"
    if key.startswith("observed."):
        return "observed", ""
    return "assumed", "given without a source"


def _file(scenario: Scenario) -> str:
    measured = scenario.measured
    return (measured.scaling or measured.step or "") if measured else ""


def _notes(scenario: Scenario, findings: Findings) -> list[str]:
    notes = []
    if findings.most_on_a_host > scenario.workers_per_host:
        weak = shares_none(findings.points)
        notes.append(
            f"{findings.most_on_a_host} workers were measured on one host; what they take from one "
            f"another there is {'taken out' if weak else 'in the prediction'}, since hosts have "
            f"{scenario.workers_per_host} in the scenario"
        )
    idle = [name for name in ("price", "spot", "faults") if getattr(scenario, name)]
    if idle and scenario.run is None:
        notes.append(f"[{'], ['.join(idle)}]: of no use without [run]")
    network = scenario.network
    line = network.bandwidth_bytes_per_s if network else None
    if line is not None and line >= 1e9 and line in {10e9, 25e9, 40e9, 50e9, 100e9, 200e9, 400e9}:
        notes.append(
            f"network.bandwidth_bytes_per_s = {line:g} is {8 * line / 1e9:g} Gbit/s; if "
            f"{line / 1e9:g} Gbit/s is meant, say bandwidth_bits_per_s"
        )
    observed = scenario.observed
    if observed is not None:
        times = dict(zip(observed.workers, observed.seconds_per_1000_samples, strict=True))
        few, many = min(times), max(times)
        if times[many] > times[few]:
            notes.append(
                f"observed: {many} workers are slower than {few}; if these are samples a second, "
                "give 1000 / (samples a second)"
            )
    if network is None and observed:
        notes.append("nothing is told of the network: communication grows as in the points")
    return notes
