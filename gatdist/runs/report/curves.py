"""Curves as SVG with their values as JSON, for tooltips, so that a page needs no library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.monitor.numbers import number

Values = NDArray[np.float64]
Indices = NDArray[np.int64]

_WIDTH, _HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 24
_MAX_POINTS = 240
_LOG_RANGE = 100.0
_COLORS = 6


@dataclass(frozen=True)
class Curve:
    """A curve: mean, minimum and maximum of each bucket of logs, NaN without values."""

    label: str
    color: str  # a CSS class
    mean: Values
    low: Values
    high: Values


def color_of(label: str, index: int) -> str:
    """Return a CSS class: one for each network and its samples, others by index."""
    if label in ("generator", "fake"):
        return "generator"
    if label in ("discriminator", "real"):
        return "discriminator"
    return f"c{index % _COLORS}"


def thinned(seen: Sequence[int], values: Sequence[Any]) -> tuple[Values, Values, Values, Values]:
    """Return last ``samples_seen``, mean, minimum and maximum of at most 240 buckets of logs."""
    x = np.asarray(seen, dtype=np.float64)
    y = np.array([v if _is_finite(v) else np.nan for v in values], dtype=np.float64)
    rows = []
    for bucket in np.array_split(np.arange(len(x)), min(len(x), _MAX_POINTS)):
        known = y[bucket][np.isfinite(y[bucket])]
        summary = (known.mean(), known.min(), known.max()) if len(known) else (np.nan,) * 3
        rows.append((x[bucket[-1]], *summary))
    ends, mean, low, high = np.array(rows).T
    return ends, mean, low, high


def chart(
    title: str,
    x: Values,
    curves: Sequence[Curve],
    marks: Sequence[int] = (),
    *,
    stacked: bool = False,
) -> str:
    """Return an HTML figure: title, legend, curves at ``x`` (``samples_seen``, ascending).

    ``marks`` are where the run was resumed; ``stacked`` draws areas on top of one another.
    """
    if stacked:
        tops = np.cumsum([np.nan_to_num(c.mean) for c in curves], axis=0)
        low, high, log = 0.0, float(tops.max(initial=0.0)), False
    else:
        everything = np.concatenate([np.concatenate([c.low, c.high]) for c in curves])
        known = everything[np.isfinite(everything)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        log = low > 0 and high / low > _LOG_RANGE
    if log:
        low, high = math.log10(low), math.log10(high)
    elif low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    axis = _Axis(low, high, log)
    px = _LEFT + (x - x[0]) / max(x[-1] - x[0], 1.0) * (_WIDTH - _LEFT - _RIGHT)
    parts = [_frame(axis, x), *(_mark(x, px, seen) for seen in marks)]
    if stacked:
        below = np.zeros(len(x))
        for curve, top in zip(curves, tops, strict=True):
            parts.append(_area(px, axis.pixels(below), axis.pixels(top), f"area {curve.color}"))
            below = top
    else:
        for curve in curves:
            if np.any(curve.high > curve.low):
                band = _area(px, axis.pixels(curve.low), axis.pixels(curve.high), "band")
                parts.append(f'<g class="{curve.color}">{band}</g>')
        parts += [_line(px, axis.pixels(curve.mean), curve.color) for curve in curves]
    values = {
        "x": _json(px, ".1f"),
        "samples_seen": [int(seen) for seen in x],
        "curves": [
            {"label": c.label, "color": c.color, "value": _json(c.mean, ".5g")} for c in curves
        ],
    }
    shown = legend((c.color, c.label, number(_last(c.mean))) for c in curves)
    note = " <small>logarithmic</small>" if log else ""
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(values, allow_nan=False))}">'
        f"<figcaption>{escape(title)}{note}</figcaption>"
        f"{shown}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def legend(items: Iterable[tuple[str, str, str]]) -> str:
    """Return a list of (CSS class, label, value)."""
    shown = (
        f'<li class="{kind}">{escape(label)} <b>{value}</b></li>' for kind, label, value in items
    )
    return f'<ul class="legend">{"".join(shown)}</ul>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    def pixels(self, values: Values) -> Values:
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.log10(values) if self.log else values
        share = (scaled - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.ceil(self.low), math.floor(self.high) + 1)
            step = max(1, len(decades) // 4)
            return [10.0**decade for decade in decades[::step]]
        return nice_ticks(self.low, self.high, 4)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Return about ``most`` round numbers between two."""
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * n for n in (1, 2, 2.5, 5, 10) if size * n >= raw)
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Format a number as ``1.2M``, ``64k`` or ``500``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _frame(axis: _Axis, x: Values) -> str:
    parts = []
    for value in axis.ticks():
        y = float(axis.pixels(np.array([value]))[0])
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>'
        )
    if x[-1] > x[0]:
        for value in nice_ticks(float(x[0]), float(x[-1]), 5):
            place = _LEFT + (value - x[0]) / (x[-1] - x[0]) * (_WIDTH - _LEFT - _RIGHT)
            at = f'x="{place:.1f}" y="{_HEIGHT - 6}"'
            parts.append(f'<text {at} text-anchor="middle">{short(value)}</text>')
    return "".join(parts)


def _mark(x: Values, px: Values, seen: int) -> str:
    if not x[0] <= seen <= x[-1]:
        return ""
    place, bottom = np.interp(seen, x, px), _HEIGHT - _BOTTOM
    line = f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}">'
    return f"{line}<title>resumed at {seen:,} samples</title></line>"


def _line(x: Values, y: Values, color: str) -> str:
    """Draw a line with gaps at NaN; isolated points are dots."""
    parts = []
    for run in _known(y):
        if len(run) == 1:
            at = f'cx="{x[run[0]]:.1f}" cy="{y[run[0]]:.1f}"'
            parts.append(f'<circle class="{color}" {at} r="2.5"/>')
        else:
            parts.append(f'<polyline class="{color}" points="{_points(x, y, run)}"/>')
    return "".join(parts)


def _area(x: Values, low: Values, high: Values, kind: str) -> str:
    return "".join(
        f'<polygon class="{kind}" points="{_points(x, high, run)} {_points(x, low, run[::-1])}"/>'
        for run in _known(high)
    )


def _points(x: Values, y: Values, places: Indices) -> str:
    return " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in places)


def _known(y: Values) -> list[Indices]:
    """Return runs of successive indices of finite values."""
    found = np.flatnonzero(np.isfinite(y))
    return [run for run in np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if len(run)]


def _last(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _json(values: Values, digits: str) -> list[float | None]:
    return [float(f"{v:{digits}}") if math.isfinite(v) else None for v in values]
