"""Bar charts of records: medians, with the lowest and highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.gpu.tables import compared
from gatdist.monitor.figures import figure

Found = Mapping[str, Any]


class Bar(NamedTuple):
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


# Label, and bars by group.
BARS: dict[str, tuple[str, Callable[[Found], dict[str, list[Bar]]]]] = {
    "step": (
        "speed relative to the bare loop",
        lambda found: _ratios(found["cases"], "size", "name", "ratio_to_bare"),
    ),
    "gpu": (
        "speed relative to the hand-written loop",
        lambda found: _ratios(
            [row for row in compared(found["parts"]) if "ratio" in row],
            *("preset", "implementation", "ratio"),
        ),
    ),
    "using": (
        "speed relative to the bare loop",
        lambda found: _ratios(
            [row | {"all": ""} for row in found["generation"]], "all", "size", "ratio_to_bare"
        ),
    ),
    "data": (
        "share of decode-only throughput",
        lambda found: _ratios(
            [row for row in found["cases"] if row["reader"] != "bare_read"],
            *("resolution", "reader", "ratio_to_limit"),
        ),
    ),
    "storage": (
        "share of the upper bound",
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
    if name not in BARS:
        return False
    title, bars = BARS[name]
    groups = bars(found)
    heights = [len(group) for group in groups.values()]
    with figure(7, 0.7 + 0.28 * sum(heights) + 0.5 * len(groups)) as made:
        axes = made.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
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
        made.savefig(path, dpi=110)
    return True
