"""Draw the figures of the documentation: ``python -m docs.figures``. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from gatdist.parallel.tree import bit_reversed, leaves_of

HERE = Path(__file__).parent
FOLDER = HERE / "figures"
DIGITS = HERE.parent / "benchmarks" / "results" / "2026-11-23_digits"

VIRTUAL_WORKERS = 4
BATCH = 8
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    digits().save(FOLDER / "digits.png", optimize=True)
    canonical(FOLDER / "canonical.svg")
    return 0


def digits() -> Image.Image:
    """The first four rows of real and of generated digits, side by side."""
    parts = [Image.open(DIGITS / name).convert("RGB") for name in ("reals.png", "grid.png")]
    width, height, gap, title = parts[0].width, parts[0].height // 2 + 2, 24, 40
    sheet = Image.new("RGB", (2 * width + gap, height + title), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=24)
    for column, (part, text) in enumerate(zip(parts, ("real", "generated"), strict=True)):
        left = column * (width + gap)
        sheet.paste(part.crop((0, 0, width, height)), (left, title))
        draw.text((left + width / 2, title / 2), text, fill="black", font=font, anchor="mm")
    return sheet


def canonical(path: Path) -> None:
    """The same batch and the same sums on one, two and three workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "gatdist", "font.size": 9}):
        figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.5))
        for panel, workers in zip(panels, (1, 2, 3), strict=True):
            _panel(panel, workers)
        figure.tight_layout(w_pad=2)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _panel(panel: Any, workers: int) -> None:
    """One number of workers: the batch, the virtual workers, and the tree of sums.

    Levels, bottom up: samples (y = 0), gradients of the virtual workers (1), the tree (2 and 3).
    A worker holds neighbouring virtual workers in the order of the tree.
    """
    x = {v: 2.0 * place + 0.5 for place, v in enumerate(bit_reversed(VIRTUAL_WORKERS))}
    for worker in range(workers):
        leaves = leaves_of(worker, workers, VIRTUAL_WORKERS)
        share, left = len(leaves), 2 * leaves.start - 0.42
        panel.add_patch(_box(left, -0.4, 2 * share - 0.16, 1.82, "#f0f0f0"))
        panel.text(left + share - 0.08, -0.62, f"worker {worker}", ha="center", va="top")
    for position in range(BATCH):
        virtual = position % VIRTUAL_WORKERS
        at = x[virtual] - 0.42 + 0.84 * (position // VIRTUAL_WORKERS)
        panel.plot([at, x[virtual]], [0.2, 0.82], color=COLORS[virtual], lw=1)
        _node(panel, at, 0, str(position), COLORS[virtual])
    for virtual, at in x.items():
        _node(panel, at, 1, f"$g_{virtual}$", COLORS[virtual])
    roots = dict(x)
    for level, half in ((2, 2), (3, 1)):
        for low in range(half):
            high = low + half
            middle = (roots[low] + roots[high]) / 2
            for start in (roots[low], roots[high]):
                panel.plot([start, middle], [level - 0.8, level - 0.2], color="#555555", lw=1)
            roots[low] = middle
            text = f"$g_{low}+g_{high}$" if level == 2 else "$(g_0+g_2)+(g_1+g_3)$"
            panel.text(
                middle, level, text, ha="center", va="center",
                bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "#555555", "lw": 0.8},
            )  # fmt: skip
    panel.set_title(f"{workers} worker{'s' if workers > 1 else ''}", fontsize=11)
    panel.set_xlim(-0.7, 7.7)
    panel.set_ylim(-1.0, 3.4)
    panel.axis("off")


def _box(left: float, bottom: float, width: float, height: float, color: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0.02,rounding_size=0.15"
    return FancyBboxPatch((left, bottom), width, height, boxstyle=style, fc=color, ec="none")


def _node(panel: Any, x: float, y: float, text: str, color: str) -> None:
    panel.text(
        x, y, text, ha="center", va="center", color="white",
        bbox={"boxstyle": "circle,pad=0.25", "fc": color, "ec": "none"},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
