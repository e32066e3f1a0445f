"""Bars of the records that have no picture of their own: medians, with the lowest and highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """One case: its name, its median, and the extremes where they are known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def _ratios(rows: list[dict[str, Any]], group: str, name: str, ratio: str) -> dict[str, list[Bar]]:
    found: dict[str, list[Bar]] = {}
    for row in rows:
        bar = Bar(row[name], row[ratio], row.get("ratio_low"), row.get("ratio_high"))
        found.setdefault(str(row[group]), []).append(bar)
    return found


def _times(named: Mapping[str, list[float]]) -> dict[str, list[Bar]]:
    return {"": [Bar(name, median(s), min(s), max(s)) for name, s in named.items()]}


# Of each record: what its bars say, and bars by group.
BARS: dict[str, tuple[str, Callable[[Found], dict[str, list[Bar]]]]] = {
    "step": (
        "times a bare loop",
        lambda found: _ratios(found["cases"], "size", "name", "ratio_to_bare"),
    ),
    "gpu": (
        "times a bare loop",
        lambda found: _ratios(found["throughput"], "size", "name", "ratio_to_bare"),
    ),
    "using": (
        "times a bare loop",
        lambda found: _ratios(
            [row | {"all": ""} for row in found["generation"]], "all", "size", "ratio_to_bare"
        ),
    ),
    "data": (
        "share of decoding alone",
        lambda found: _ratios(
            [row for row in found["cases"] if row["reader"] != "bare_read"],
            *("resolution", "reader", "ratio_to_limit"),
        ),
    ),
    "storage": (
        "share of what is possible",
        lambda found: _ratios(found["cases"], "resolution", "case", "ratio_to_limit"),
    ),
    "startup": (
        "seconds",
        lambda found: _times({one["what"]: one["seconds"] for one in found["cases"]}),
    ),
    "recovery": (
        "seconds to the next new step",
        lambda found: _times(
            {kind: [one["total_s"] for one in all_] for kind, all_ in found["measured"].items()}
        ),
    ),
}


def draw(name: str, found: Found, path: Path) -> bool:
    """Draw the bars of a record; False if it has none."""
    if name not in BARS:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    title, bars = BARS[name]
    groups = bars(found)
    heights = [len(group) for group in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(7, 0.7 + 0.28 * sum(heights) + 0.5 * len(groups)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (group, members) in zip(axes[:, 0], groups.items(), strict=True):
        names = [bar.name.replace("_", " ").replace("`", "") for bar in members]
        values = [bar.value for bar in members]
        axis.barh(names, values, color="#7aa6d8", height=0.7)
        for row, bar in enumerate(members):
            if bar.low is not None and bar.high is not None:
                axis.plot([bar.low, bar.high], [row, row], color="#222222", linewidth=1.2)
        axis.invert_yaxis()
        axis.set_title(group, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    axes[-1, 0].set_xlabel(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
