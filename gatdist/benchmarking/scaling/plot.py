"""The curves of ``gatdist bench scaling``: samples a second, and the share of the limit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from gatdist.benchmarking.scaling.table import by_size_and_mode, title

_MEASURED, _LIMIT, _IDEAL = "#1f5fa8", "#e08a1e", "#8a8f98"
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#333333",
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.fonttype": "path",
    "svg.hashsalt": "gatdist",  # names of its parts; else they are random
}


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw all curves: two rows for each size, a column for each mode.

    Args:
        found: with ``points`` and ``hosts``, as :func:`~.measure.measure` made them.

    Returns:
        The files' contents, ``scaling.svg`` and ``scaling.png``, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = list(by_size_and_mode(found["points"]))
    sizes = list(dict.fromkeys(curve[0]["size"] for curve in curves))
    columns = len(curves) // len(sizes)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * columns, 5.6 * len(sizes) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(
            2 * len(sizes), columns, squeeze=False, height_ratios=[3, 2] * len(sizes)
        )
        for number, curve in enumerate(curves):
            row, column = 2 * (number // columns), number % columns
            _speed(axes[row][column], curve, first=number == 0)
            _efficiency(axes[row + 1][column], curve)
        figure.supxlabel(_hardware(found["hosts"]), fontsize=8, color="#777777")
        files = {}
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            # Without a date, the same numbers are the same bytes.
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(buffer, format=kind, dpi=144, metadata=metadata)
            files[f"scaling.{kind}"] = buffer.getvalue()
    return files


def _speed(axis: Any, curve: Sequence[Mapping[str, Any]], *, first: bool) -> None:
    counts = [point["workers"] for point in curve]
    speeds = [point["samples_per_s"] for point in curve]
    limits = [point["limit_samples_per_s"] for point in curve]
    ideal = [speeds[0] * count / counts[0] for count in counts]
    axis.plot(counts, ideal, color=_IDEAL, linestyle=(0, (4, 3)), linewidth=1.2, label="ideal")
    axis.plot(counts, limits, "s-", color=_LIMIT, markersize=5, label="limit: no communication")
    axis.plot(counts, speeds, "o-", color=_MEASURED, markersize=6, linewidth=2, label="measured")
    axis.set(title=f"{curve[0]['size']}, {title(curve[0])}", ylabel="samples / s")
    if _is_wide(counts):
        axis.set_yscale("log", base=2)
    else:
        axis.set_ylim(0, 1.08 * max(*ideal, *limits))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(labelbottom=False)
    if first:
        axis.legend(frameon=False, loc="upper left", reverse=True)
    _tidy(axis, counts)


def _efficiency(axis: Any, curve: Sequence[Mapping[str, Any]]) -> None:
    counts = [point["workers"] for point in curve]
    middle = [100 * point["efficiency"] for point in curve]
    errors = [
        [100 * (point["efficiency"] - point["efficiency_low"]) for point in curve],
        [100 * (point["efficiency_high"] - point["efficiency"]) for point in curve],
    ]
    axis.axhline(100, color=_LIMIT, linewidth=1.2)
    axis.errorbar(
        counts, middle, errors, fmt="o-", color=_MEASURED, linewidth=2, markersize=6, capsize=4
    )
    for count, value in zip(counts, middle, strict=True):
        axis.annotate(
            f"{value:.0f} %", (count, value), (0, -18), textcoords="offset points", ha="center",
            color=_MEASURED, fontsize=9,
        )  # fmt: skip
    highest = max(100 * point["efficiency_high"] for point in curve)
    axis.set(xlabel="workers", ylabel="efficiency, %", ylim=(0, max(112, 1.05 * highest)))
    _tidy(axis, counts)


def _tidy(axis: Any, counts: Sequence[int]) -> None:
    if _is_wide(counts):
        axis.set_xscale("log", base=2)
        axis.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    else:
        axis.set_xlim(counts[0] - 0.06 * counts[-1], counts[-1] * 1.06)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _is_wide(counts: Sequence[int]) -> bool:
    """Whether small counts would lie on one another where the axis is not logarithmic."""
    return counts[-1] > 8 * counts[0]


def _hardware(hosts: Sequence[Mapping[str, Any]]) -> str:
    """What it was measured on: each kind of host, and how many there are of it."""
    kinds = [f"{h['gpu'] or h['processor']}, {h['cores']} cores" for h in hosts]
    counted = [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)]
    versions = ", ".join(f"{name} {version}" for name, version in hosts[0]["packages"].items())
    return f"{'; '.join(counted)}\n{versions}"
