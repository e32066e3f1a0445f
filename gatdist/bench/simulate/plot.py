"""The curves of ``gatdist simulate``: speed, where the time goes, and what a run costs.

What was seen is drawn as filled circles; what is simulated, as hollow diamonds on a dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gatdist.monitor.figures import IDEAL, LIMIT, MEASURED, figure, files, tidy
from gatdist.monitor.numbers import number

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


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw what :func:`~gatdist.bench.simulate.study.simulate` found.

    Returns:
        The files' contents, ``simulation.svg`` and ``simulation.png``, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = sorted(found["points"], key=lambda point: point["workers"])
    counts = sorted({p["workers"] for p in (*points, *found["observed"], *found["held_out"])})
    with_runs = any(run["hours"] is not None for point in points for run in point["runs"])
    panels: list[tuple[Callable[..., None], float]] = [(_speed, 5.0), (_parts, 3.8)]
    if with_runs:
        panels.append((_money, 3.8))
    if len(counts) == 1:
        panels = [(_bars, 1.6 + 0.8 * len(points[0]["runs"]))]
    heights = [height for _, height in panels]
    with figure(9.0, sum(heights) * 0.85) as made:
        axes = made.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (panel, _) in zip(axes, panels, strict=True):
            panel(axis, found, points)
            if panel is not _bars:
                _by_workers(axis, counts)
                axis.set_xlabel("workers")
        made.suptitle(found["scenario"] or "scenario", fontweight="bold", fontsize=12)
        made.supxlabel(_reported(found), fontsize=8, color="#777777")
        return files(made, "simulation")


def _speed(axis: Any, found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    counts = [p["workers"] for p in points]
    speeds = [p["samples_per_s"] for p in points]
    low = [1000 / p["seconds_per_1000_samples_high"] for p in points]
    high = [1000 / p["seconds_per_1000_samples_low"] for p in points]
    one = speeds[0] / counts[0] / points[0]["efficiency"]
    seen = found["observed"]
    ends = sorted({*counts, *(p["workers"] for p in seen)})
    axis.plot(
        ends, [one * count for count in ends], color=IDEAL, linestyle=(0, (4, 3)), linewidth=1.2,
        label="ideal: as many times one worker",
    )  # fmt: skip
    if any(a < b for a, b in zip(low, high, strict=True)):
        axis.fill_between(
            counts, low, high, color=_SIMULATED, alpha=0.15, linewidth=0,
            label="simulated: 8 of 10 times lie in it",
        )  # fmt: skip
    axis.plot(
        counts, speeds, "D--", color=_SIMULATED, markerfacecolor="white", markersize=6,
        linewidth=1.6, label="simulated",
    )  # fmt: skip
    if seen:
        axis.plot(
            [p["workers"] for p in seen], [1000 / p["seconds_per_1000_samples"] for p in seen],
            "o", color=MEASURED, markersize=7, label=f"{_kind_of(found)}, fitted to",
        )  # fmt: skip
    for point in points:
        axis.annotate(
            f"{point['efficiency']:.0%}", (point["workers"], point["samples_per_s"]), (6, -14),
            textcoords="offset points", fontsize=8, color=_SIMULATED,
        )  # fmt: skip
    for point in found["held_out"]:
        axis.plot(
            point["workers"], 1000 / point["seconds_per_1000_samples"], "X", color="#222222",
            markersize=8, label="held out: timed, not fitted to",
        )  # fmt: skip
    _by_factors(axis)
    axis.margins(y=0.12)
    axis.set(ylabel="samples / s", title="speed, and efficiency in percent")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axis.legend(once.values(), once.keys(), frameon=False, loc="upper left", reverse=True)


def _kind_of(found: Mapping[str, Any]) -> str:
    """Published points were observed by others."""
    message = [i for i in found["inputs"] if i["key"] == "observed.seconds_per_1000_samples"]
    kind: str = message[0]["kind"] if message else found["observed"][0]["kind"]
    return kind


def _parts(axis: Any, found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    """Stacked shares: of the cheapest market's run where there is one, else of a step."""
    market = found["advice"]["market"]
    runs = [run for point in points for run in point["runs"] if run["market"] == market]
    counts = [point["workers"] for point in points]
    _stack(axis.bar, "bottom", counts, runs or points, [0.5 * count for count in counts])
    what = f"run ({market})" if runs else "step"
    axis.set(ylabel="% of the time", ylim=(0, 100))
    axis.set_title(f"simulated: where the time of a {what} goes")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _bars(axis: Any, found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    """Of one number of workers: a bar for a step, and one for the run in each market."""
    (point,) = points
    seconds = number(point["seconds_per_1000_samples"])
    names = [f"a step\n{seconds} s for 1,000"]
    for run in point["runs"]:
        hours = "never ends" if run["hours"] is None else f"{number(run['hours'])} h"
        usd = "" if run["usd"] is None else f", {run['usd']:,.0f} USD"
        names.append(f"the run, {run['market']}\n{hours}{usd}")
    rows = list(range(len(names)))
    _stack(axis.barh, "left", rows, [point, *point["runs"]], [0.6] * len(rows))
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.set(xlabel="% of the time", xlim=(0, 100))
    axis.set_title(f"simulated: where the time of {point['workers']:,} workers goes")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _stack(
    bar: Callable[..., Any],
    begins: str,
    places: Sequence[float],
    of: Sequence[Mapping[str, Any]],
    widths: Sequence[float],
) -> None:
    """Bars of parts on top of one another; what nobody would see is left out."""
    reached = [0.0] * len(of)
    for name, colour in _COLOURS.items():
        sizes = [100 * one["parts"].get(name, 0.0) for one in of]
        if max(sizes) >= 0.05:
            bar(places, sizes, widths, **{begins: reached}, color=colour, label=name)
            reached = [a + b for a, b in zip(reached, sizes, strict=True)]


def _money(axis: Any, found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    """Hours to the left, dollars to the right; a line style for each market."""
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
    axis.set_title("simulated: what the run takes and costs")
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


def _reported(found: Mapping[str, Any]) -> str:
    """Which numbers are which."""
    kinds = dict.fromkeys(("measured", "observed", "published", "assumed"), 0)
    for one in found["inputs"]:
        kinds[one["kind"]] += 1
    from_ = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    timed = ["circles"] * bool(found["observed"]) + ["crosses"] * bool(found["held_out"])
    seen = (
        f"{' and '.join(timed)} were timed, all else is simulated" if timed else "all is simulated"
    )
    return f"{seen}; from figures of which are {from_}"
