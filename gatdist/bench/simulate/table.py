"""What ``gatdist simulate`` answers, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gatdist.monitor.numbers import aligned, count, number, percent

_NONE = "–"


def table(found: Mapping[str, Any]) -> str:
    """The result of :func:`~gatdist.bench.simulate.study.simulate`: steps, runs, advice, inputs."""
    blocks = [_inputs(found["inputs"]), f"{found['scenario'] or 'scenario'}: simulated"]
    blocks.append(_steps(found["points"]))
    if found["observed"]:
        blocks.append(_observed(found["observed"]))
    if found["held_out"]:
        blocks.append(_held_out(found["held_out"]))
    blocks += _runs(found["points"])
    if found["notes"]:
        blocks.append("\n".join(f"note: {note}" for note in found["notes"]))
    return "\n\n".join([*blocks, "\n".join(_advice(found))])


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


def _held_out(points: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{point['workers']:,}",
            number(point["seconds_per_1000_samples"]),
            number(point["simulated_seconds_per_1000_samples"]),
            f"{point['error']:+.1%}",
        )
        for point in points
    ]
    mean = sum(abs(point["error"]) for point in points) / len(points)
    return f"{aligned([('held out', 's / 1,000', 'simulated', 'error'), *rows])}\nmean {mean:.1%}"


def _runs(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head = ("workers", "hours", "8 of 10", "goodput", "faults", "USD", "USD / million",
            "largest loss", "checkpoint every", "best", "Young", "Daly")  # fmt: skip
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
        *(_usd(run[name]) for name in ("usd", "usd_per_million_samples")),
        _part(run, "largest_loss"),
        *(_seconds(checkpoint[name]) for name in ("interval_s", "best_s", "young_s", "daly_s")),
    )


def _usd(usd: float | None) -> str:
    if usd is None:
        return _NONE
    return count(usd) if usd >= 100 else f"{usd:.2f}"


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
    message = [
        text.format(f"{advice[key]:,}")
        for key, text in (
            ("fastest", "fastest with {} workers"),
            ("cheapest", "cheapest with {}"),
            ("fewest_in_time", "keeps the deadline from {} on"),
            ("fastest_within_budget", "within the budget fastest with {}"),
        )
        if advice[key] is not None
    ]
    if message:
        where = f"{advice['market'].capitalize()} hosts" if advice["market"] else "A step"
        yield f"{where}: {', '.join(message)}."


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> str:
    """What went in: how far an answer can be trusted is decided here."""
    rows = [
        (one["key"], _figure(one["value"]), one["kind"].ljust(9), one["source"]) for one in inputs
    ]
    wide = max((len(row[3]) for row in rows), default=0)
    return aligned(
        [("figure", "", "", "".ljust(wide)), *((*row[:3], row[3].ljust(wide)) for row in rows)]
    )


def _figure(value: Any) -> str:
    return " ".join(map(_figure, value)) if isinstance(value, list) else f"{value:.6g}"
