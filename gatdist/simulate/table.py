"""What ``gatdist simulate`` answers, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gatdist.monitor.numbers import aligned, number, percent

_NONE = "–"


def table(found: Mapping[str, Any]) -> str:
    """The result of :func:`~gatdist.simulate.study.simulate`: steps, runs, advice, inputs."""
    blocks = [f"{found['scenario'] or 'scenario'}: simulated", _steps(found["points"])]
    if found["observed"]:
        blocks.append(_observed(found["observed"]))
    blocks += _runs(found["points"])
    blocks.append("\n".join([*_advice(found), *_inputs(found["inputs"])]))
    if found["notes"]:
        blocks.append("\n".join(f"note: {note}" for note in found["notes"]))
    return "\n\n".join(blocks)


def _steps(points: Sequence[Mapping[str, Any]]) -> str:
    head = ("workers", "hosts", "batch", "s / 1,000", "8 of 10", "samples/s", "efficiency",
            "bottleneck", "largest loss")  # fmt: skip
    rows = [
        (
            f"{point['workers']:,}",
            f"{point['hosts']:,}",
            _NONE if point["global_batch"] is None else f"{point['global_batch']:,}",
            number(point["seconds_per_1000_samples"]),
            _range(point, "seconds_per_1000_samples"),
            number(point["samples_per_s"]),
            percent(point["efficiency"]),
            _part(point, "bottleneck"),
            _part(point, "largest_loss"),
        )
        for point in points
    ]
    return aligned([head, *rows])


def _observed(observed: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{seen['workers']:,}",
            seen["kind"],
            number(seen["seconds_per_1000_samples"]),
            number(seen["fitted_seconds_per_1000_samples"]),
        )
        for seen in observed
    ]
    return aligned([("workers", "", "s / 1,000", "fitted"), *rows])


def _runs(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("workers", "hours", "8 of 10", "goodput", "faults", "USD", "largest loss",
            "checkpoint every", "best", "Young", "Daly")  # fmt: skip
    markets = dict.fromkeys(run["market"] for point in points for run in point["runs"])
    for market in markets:
        rows = [
            (f"{point['workers']:,}", *_run(run))
            for point in points
            for run in point["runs"]
            if run["market"] == market
        ]
        yield f"the run, {market}\n" + aligned([head, *rows])


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    checkpoint = run["checkpoint"]
    return (
        "never ends" if run["hours"] is None else number(run["hours"]),
        _NONE if run["hours"] is None else _range(run, "hours"),
        percent(run["goodput"]),
        number(run["faults"]),
        _NONE if run["usd"] is None else number(run["usd"]),
        _part(run, "largest_loss"),
        *(_seconds(checkpoint[name]) for name in ("interval_s", "best_s", "young_s", "daly_s")),
    )


def _part(point: Mapping[str, Any], which: str) -> str:
    name = point[which]
    return _NONE if name is None else f"{name} {percent(point['parts'][name])}"


def _range(values: Mapping[str, Any], key: str) -> str:
    low, high = values[f"{key}_low"], values[f"{key}_high"]
    return _NONE if low == high else f"{number(low)} to {number(high)}"


def _seconds(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{number(seconds)} s"


def _advice(found: Mapping[str, Any]) -> Iterator[str]:
    advice, counts = found["advice"], [point["workers"] for point in found["points"]]
    worth, stops = percent(advice["worth"]), advice["stops_paying"]
    if stops is None:
        yield f"Up to {max(counts):,} workers, each added one brings at least {worth} of one."
    else:
        yield f"Adding workers stops paying at {stops:,}: another brings less than {worth} of one."
    for key, text in (
        ("fastest", "Fastest: {}."),
        ("cheapest", "Cheapest: {}."),
        ("fewest_in_time", "Fewest that keep the deadline: {}."),
        ("fastest_within_budget", "Fastest within the budget: {}."),
    ):
        if advice[key] is not None:
            where = f", {advice['market']}" if advice["market"] else ""
            yield text.format(f"{advice[key]:,} workers{where}")


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Figures by kind: what is assumed is told by name, since it decides how far to trust this."""
    for kind in ("measured", "observed", "published", "assumed"):
        keys = [one["key"] for one in inputs if one["kind"] == kind]
        if keys:
            yield f"{kind}: {', '.join(keys)}"
