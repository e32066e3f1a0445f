"""Figures with reproducible bytes; they need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MEASURED, LIMIT, IDEAL = "#1f5fa8", "#e08a1e", "#8a8f98"
_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#333333",
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.fonttype": "path",
    "svg.hashsalt": "gatdist",  # ids are random without it
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """An empty figure, size in inches, which opens no window."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made


def files(made: Any, name: str) -> dict[str, bytes]:
    """Return ``name.svg`` and ``name.png`` with their contents. Only within :func:`figure`."""
    found = {}
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        made.savefig(buffer, format=kind, dpi=144, metadata=metadata)
        found[f"{name}.{kind}"] = buffer.getvalue()
    return found


def tidy(axis: Any) -> None:
    """Leave only a faint grid around the curves."""
    axis.minorticks_off()
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
