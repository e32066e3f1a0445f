"""Tables and figures of ``gatdist simulate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gatdist.monitor.figures import IDEAL, LIMIT, MEASURED, figure, files, tidy
from gatdist.monitor.numbers import aligned, count, number, percent

Points = Sequence[Mapping[str, Any]]
_NONE = "–"
_SECONDS = "seconds_per_1000_samples"
_SIMULATED = "#b0413e"
_COLOURS = {
    "computation": "#1f5fa8",
    "overhead": "#7fb0dd",
    "communication": "#e08a1e",
    "stragglers": "#f2c879",
    "data": "#8c6bb1",
    "hosts away": "#c9b3d9",
    "lost work": "#b0413e",
    "checkpoints": "#6b9e5b",
    "restarts": "#b8b8b8",
}


def table(found: Mapping[str, Any]) -> str:
    """Format the result of :func:`~gatdist.bench.simulate.study.simulate`."""
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


def _steps(points: Points) -> str:
    head = ("workers", "hosts", "batch", "s / 1,000", "80 % interval", "samples/s", "efficiency",
            "bottleneck", "largest loss")  # fmt: skip
    rows = [
        (
            f"{point['workers']:,}",
            f"{point['hosts']:,}",
            _NONE if point["global_batch"] is None else f"{point['global_batch']:,}",
            number(point[_SECONDS]),
            _range(point, _SECONDS),
            number(point["samples_per_s"]),
            percent(point["efficiency"]),
            _part(point, "bottleneck"),
            _part(point, "largest_loss"),
        )
        for point in points
    ]
    return aligned([head, *rows])


def _observed(observed: Points) -> str:
    rows = [
        (
            f"{seen['workers']:,}",
            seen["kind"],
            *(number(seen[k]) for k in (_SECONDS, f"fitted_{_SECONDS}")),
        )
        for seen in observed
    ]
    return aligned([("workers", "", "s / 1,000", "fitted"), *rows])


def _held_out(points: Points) -> str:
    rows = [
        (
            f"{point['workers']:,}",
            number(point[_SECONDS]),
            number(point[f"simulated_{_SECONDS}"]),
            f"{point['error']:+.1%}",
        )
        for point in points
    ]
    mean = sum(abs(point["error"]) for point in points) / len(points)
    return f"{aligned([('held out', 's / 1,000', 'simulated', 'error'), *rows])}\nmean {mean:.1%}"


def _runs(points: Points) -> Iterator[str]:
    head = ("workers", "hours", "80 % interval", "goodput", "faults", "USD", "USD / million",
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
        if recoveries := _recoveries(points, market):
            yield f"goodput and s / 1,000 by size and after_loss, {market}\n" + recoveries


def _recoveries(points: Points, market: str) -> str:
    """Goodput and seconds per 1,000 samples by number of workers and way to recover."""
    rows, ways = [], dict[str, None]()
    for point in points:
        for run in point["runs"]:
            if run["market"] == market and run["recoveries"]:
                found = {f"{one['size']}, {one['after_loss']}": one for one in run["recoveries"]}
                ways |= dict.fromkeys(found)
                rows.append((point["workers"], found))
    cells = [
        (f"{workers:,}", *(_recovery(found.get(way)) for way in ways)) for workers, found in rows
    ]
    return aligned([("workers", *ways), *cells]) if rows else ""


def _recovery(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return _NONE
    seconds = one[_SECONDS]
    return "never ends" if seconds is None else f"{percent(one['goodput'])}  {number(seconds)}"


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
        yield f"Up to {max(counts):,} workers, each added worker adds at least {worth} of one."
    else:
        yield f"Adding workers stops paying at {stops:,}: another adds less than {worth} of one."
    chosen = [
        text.format(f"{advice[key]:,}")
        for key, text in (
            ("fastest", "fastest with {} workers"),
            ("cheapest", "cheapest with {}"),
            ("fewest_in_time", "meets the deadline from {} on"),
            ("fastest_within_budget", "fastest within the budget with {}"),
        )
        if advice[key] is not None
    ]
    if chosen:
        where = f"{advice['market'].capitalize()} hosts" if advice["market"] else "A step"
        yield f"{where}: {', '.join(chosen)}."


def _inputs(inputs: Points) -> str:
    rows = [
        (one["key"], _figure(one["value"]), one["kind"].ljust(9), one["source"]) for one in inputs
    ]
    wide = max((len(row[3]) for row in rows), default=0)
    return aligned(
        [("figure", "", "", "".ljust(wide)), *((*row[:3], row[3].ljust(wide)) for row in rows)]
    )


def _figure(value: Any) -> str:
    return " ".join(map(_figure, value)) if isinstance(value, list) else f"{value:.6g}"


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw speed, the breakdown of the time, and hours and cost of a run.

    Measured points are filled circles; simulated ones are hollow diamonds on a dashed line.

    Returns:
        Contents of ``simulation.svg`` and ``simulation.png``, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = sorted(found["points"], key=lambda point: point["workers"])
    counts = sorted({p["workers"] for p in (*points, *found["observed"], *found["held_out"])})
    with_runs = any(run["hours"] is not None for point in points for run in point["runs"])
    panels: list[tuple[Callable[..., None], float]] = [(_draw_speed, 5.0), (_draw_parts, 3.8)]
    if with_runs:
        panels.append((_draw_runs, 3.8))
    heights = [height for _, height in panels]
    with figure(9.0, sum(heights) * 0.85) as made:
        axes = made.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (panel, _) in zip(axes, panels, strict=True):
            panel(axis, found, points)
            _by_workers(axis, counts)
            axis.set_xlabel("workers")
        made.suptitle(found["scenario"] or "scenario", fontweight="bold", fontsize=12)
        made.supxlabel(_kinds(found), fontsize=8, color="#777777")
        return files(made, "simulation")


def _draw_speed(axis: Any, found: Mapping[str, Any], points: Points) -> None:
    counts = [p["workers"] for p in points]
    speeds = [p["samples_per_s"] for p in points]
    low = [1000 / p["seconds_per_1000_samples_high"] for p in points]
    high = [1000 / p["seconds_per_1000_samples_low"] for p in points]
    one = speeds[0] / counts[0] / points[0]["efficiency"]
    seen = found["observed"]
    ends = sorted({*counts, *(p["workers"] for p in seen)})
    axis.plot(
        ends, [one * count for count in ends], color=IDEAL, linestyle=(0, (4, 3)), linewidth=1.2,
        label="linear speedup",
    )  # fmt: skip
    if any(a < b for a, b in zip(low, high, strict=True)):
        axis.fill_between(
            counts, low, high, color=_SIMULATED, alpha=0.15, linewidth=0,
            label="simulated, 80 % interval",
        )  # fmt: skip
    axis.plot(
        counts, speeds, "D--", color=_SIMULATED, markerfacecolor="white", markersize=6,
        linewidth=1.6, label="simulated",
    )  # fmt: skip
    if seen:
        axis.plot(
            [p["workers"] for p in seen], [1000 / p[_SECONDS] for p in seen],
            "o", color=MEASURED, markersize=7, label=f"{_kind_of(found)}, fitted",
        )  # fmt: skip
    for point in points:
        axis.annotate(
            f"{point['efficiency']:.0%}", (point["workers"], point["samples_per_s"]), (6, -14),
            textcoords="offset points", fontsize=8, color=_SIMULATED,
        )  # fmt: skip
    for point in found["held_out"]:
        axis.plot(
            point["workers"], 1000 / point[_SECONDS], "X", color="#222222",
            markersize=8, label="held out",
        )  # fmt: skip
    _by_factors(axis)
    axis.margins(y=0.12)
    axis.set(ylabel="samples / s", title="speed and efficiency")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once.keys(), frameon=False, loc="upper left", reverse=True)


def _kind_of(found: Mapping[str, Any]) -> str:
    """Kind of the fitted points; published ones count as observed elsewhere."""
    kinds = [one["kind"] for one in found["inputs"] if one["key"] == f"observed.{_SECONDS}"]
    kind: str = kinds[0] if kinds else found["observed"][0]["kind"]
    return kind


def _draw_parts(axis: Any, found: Mapping[str, Any], points: Points) -> None:
    """Stacked shares of the cheapest market's run, or of a step if there are no runs."""
    market = found["advice"]["market"]
    runs = [run for point in points for run in point["runs"] if run["market"] == market]
    counts = [point["workers"] for point in points]
    reached = [0.0] * len(points)
    for name, colour in _COLOURS.items():
        sizes = [100 * one["parts"].get(name, 0.0) for one in runs or points]
        if max(sizes) >= 0.05:  # visible
            widths = [0.5 * count for count in counts]
            axis.bar(counts, sizes, widths, bottom=reached, color=colour, label=name)
            reached = [a + b for a, b in zip(reached, sizes, strict=True)]
    axis.set(ylabel="% of time", ylim=(0, 100))
    axis.set_title(f"simulated: time of a {f'run ({market})' if runs else 'step'}")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _draw_runs(axis: Any, found: Mapping[str, Any], points: Points) -> None:
    from matplotlib.ticker import EngFormatter

    right = axis.twinx()
    markets = dict.fromkeys(run["market"] for point in points for run in point["runs"])
    lines = []
    for market, style in zip(markets, ("D--", "s:"), strict=False):
        curve = [
            (point["workers"], run)
            for point in points
            for run in point["runs"]
            if run["market"] == market and run["hours"] is not None
        ]
        counts = [workers for workers, _ in curve]
        for side, key, colour in ((axis, "hours", _SIMULATED), (right, "usd", LIMIT)):
            if curve and all(run[key] is not None for _, run in curve):
                lines += side.plot(
                    counts, [run[key] for _, run in curve], style, color=colour,
                    markerfacecolor="white", label=f"{'USD' if key == 'usd' else key}, {market}",
                )  # fmt: skip
    for side, label in ((axis, "hours"), (right, "USD")):
        side.set_ylabel(label)
        if side.lines:
            _by_factors(side)
    right.yaxis.set_major_formatter(EngFormatter(sep=""))  # 7.5M
    right.minorticks_off()
    right.spines[["top"]].set_visible(False)
    right.set_visible(bool(right.lines))
    axis.set_title("simulated: duration and cost of the run")
    names = [line.get_label() for line in lines]
    axis.legend(lines, names, frameon=False, loc="center left", bbox_to_anchor=(1.12, 0.5))


def _by_factors(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.yaxis.set_major_formatter("{x:,.10g}")


def _by_workers(axis: Any, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlim(counts[0] / 1.6, counts[-1] * 1.6)
    size = 10 if len(counts) < 10 else 8
    axis.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=size)
    tidy(axis)


def _kinds(found: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(("measured", "observed", "published", "assumed"), 0)
    for one in found["inputs"]:
        kinds[one["kind"]] += 1
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    timed = ["circles"] * bool(found["observed"]) + ["crosses"] * bool(found["held_out"])
    which = f"{' and '.join(timed)} are measured, the rest" if timed else "everything"
    return f"{which} is simulated; inputs: {counts}"
