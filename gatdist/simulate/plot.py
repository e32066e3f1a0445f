"""The curves of ``gatdist simulate``: speed, where the time goes, and what a run costs.

What was seen is drawn as filled circles; what is simulated, as hollow diamonds on a dashed line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gatdist.monitor.figures import IDEAL, LIMIT, MEASURED, figure, files, tidy

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
    """Draw what :func:`~gatdist.simulate.study.simulate` found.

    Returns:
        The files' contents, ``simulation.svg`` and ``simulation.png``, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = sorted(found["points"], key=lambda point: point["workers"])
    priced = any(run["hours"] is not None for point in points for run in point["runs"])
    with figure(9.0, 10.8 if priced else 7.6) as made:
        axes = made.subplots(3 if priced else 2, 1, height_ratios=[5, 4, 4][: 3 if priced else 2])
        counts = sorted({p["workers"] for p in (*points, *found["observed"], *found["held_out"])})
        _speed(axes[0], found, points)
        _parts(axes[1], points)
        if priced:
            _money(axes[2], points)
        for axis in axes:
            _by_workers(axis, counts)
        axes[-1].set_xlabel("workers")
        made.suptitle(found["scenario"] or "scenario", fontweight="bold", fontsize=12)
        made.supxlabel(_told(found), fontsize=8, color="#777777")
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
            label="simulated: 8 of 10 variants that the points allow",
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
    told = [i for i in found["inputs"] if i["key"] == "observed.seconds_per_1000_samples"]
    kind: str = told[0]["kind"] if told else found["observed"][0]["kind"]
    return kind


def _parts(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Stacked shares: of the run where there is one, else of a step."""
    ran = all(point["runs"] for point in points)
    shares = [point["runs"][0]["parts"] if ran else point["parts"] for point in points]
    counts = [point["workers"] for point in points]
    bottom = [0.0] * len(points)
    for name, colour in _COLOURS.items():
        heights = [100 * share.get(name, 0.0) for share in shares]
        if max(heights) < 0.05:
            continue
        axis.bar(
            counts, heights, bottom=bottom, color=colour, label=name,
            width=[0.5 * count for count in counts], align="center",
        )  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    what = f"run ({points[0]['runs'][0]['market']})" if ran else "step"
    axis.set(ylabel="% of the time", ylim=(0, 100))
    axis.set_title(f"simulated: where the time of a {what} goes")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _money(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Hours to the left, dollars to the right; a line style for each market."""
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
        _by_factors(side)
        side.set_ylabel(label)
    right.minorticks_off()
    right.spines[["top"]].set_visible(False)
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


def _told(found: Mapping[str, Any]) -> str:
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
