"""The curves of ``gatdist bench scaling``: samples a second, and the share of the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gatdist.bench.scaling.table import by_size_and_mode, title
from gatdist.monitor.figures import IDEAL, LIMIT, MEASURED, figure, files, tidy


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw all curves: two rows for each size, a column for each mode.

    Args:
        found: with ``points`` and ``hosts``, as :func:`~.measure.measure` made them.

    Returns:
        The files' contents, ``scaling.svg`` and ``scaling.png``, by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = list(by_size_and_mode(found["points"]))
    sizes = list(dict.fromkeys(curve[0]["size"] for curve in curves))
    columns = len(curves) // len(sizes)
    with figure(5.2 * columns, 5.6 * len(sizes) + 0.5) as made:
        axes = made.subplots(
            2 * len(sizes), columns, squeeze=False, height_ratios=[3, 2] * len(sizes)
        )
        for number, curve in enumerate(curves):
            row, column = 2 * (number // columns), number % columns
            _speed(axes[row][column], curve, first=number == 0)
            _efficiency(axes[row + 1][column], curve)
        made.supxlabel(_hardware(found["hosts"]), fontsize=8, color="#777777")
        return files(made, "scaling")


def _speed(axis: Any, curve: Sequence[Mapping[str, Any]], *, first: bool) -> None:
    counts = [point["workers"] for point in curve]
    speeds = [point["samples_per_s"] for point in curve]
    limits = [point["limit_samples_per_s"] for point in curve]
    ideal = [speeds[0] * count / counts[0] for count in counts]
    axis.plot(counts, ideal, color=IDEAL, linestyle=(0, (4, 3)), linewidth=1.2, label="ideal")
    axis.plot(counts, limits, "s-", color=LIMIT, markersize=5, label="limit: no communication")
    axis.plot(counts, speeds, "o-", color=MEASURED, markersize=6, linewidth=2, label="measured")
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
    axis.axhline(100, color=LIMIT, linewidth=1.2)
    axis.errorbar(
        counts, middle, errors, fmt="o-", color=MEASURED, linewidth=2, markersize=6, capsize=4
    )
    for count, value in zip(counts, middle, strict=True):
        axis.annotate(
            f"{value:.0f} %", (count, value), (0, -18), textcoords="offset points", ha="center",
            color=MEASURED, fontsize=9,
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
    tidy(axis)


def _is_wide(counts: Sequence[int]) -> bool:
    """Whether small counts would lie on one another where the axis is not logarithmic."""
    return counts[-1] > 8 * counts[0]


def _hardware(hosts: Sequence[Mapping[str, Any]]) -> str:
    """What it was measured on: each kind of host, and how many there are of it."""
    kinds = [f"{h['gpu'] or h['processor']}, {h['cores']} cores" for h in hosts]
    counted = [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)]
    versions = ", ".join(f"{name} {version}" for name, version in hosts[0]["packages"].items())
    return f"{'; '.join(counted)}\n{versions}"
