"""Images that show samples."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_READABLE_PIXELS = 48  # of an image's shorter side, at least
_GAP_PIXELS = 4
_BACKGROUND = 255
_TITLE_PIXELS = 14
_RIGHT_OF_CELL, _RIGHT_OF_GROUP = ((0, 0), (0, 0), (0, 2), (0, 0)), 12


def make_grid(samples: Pixels, columns: int | None = None) -> Pixels:
    """Arrange images uint8 [n, H, W, C] on white; return uint8 [height, width, C].

    Small images are upscaled by an integer factor. Of 2 channels the first is shown, of more than 4
    the first three. Without ``columns``, the number of images per row, the grid is about square.
    """
    n, height, width, channels = samples.shape
    if channels not in (1, 3, 4):
        samples = samples[..., : 3 if channels > 4 else 1]
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = -(-n // columns)
    scale = max(1, -(-_READABLE_PIXELS // min(height, width)))
    # Upscale, and add the gap at bottom and right: [n, h, w, C].
    cells = samples.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = (0, _GAP_PIXELS)
    cells = _pad(cells, (0, rows * columns - n), gap, gap, (0, 0))
    _, h, w, c = cells.shape
    # [rows, columns, h, w, C] → [rows, h, columns, w, C]: a row of pixels runs through all columns.
    grid = cells.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
    return _pad(grid.reshape(rows * h, columns * w, c), gap[::-1], gap[::-1], (0, 0))


def make_rows(columns: Mapping[str, Pixels]) -> Pixels:
    """Show images side by side: one of each column, titled; return uint8 [height, width, 3].

    Columns are uint8 [n, H, W, 1 or 3], by title. The i-th images of all form a group, upscaled to
    one height; as many groups per line as make the whole about square.
    """
    tallest = max(images.shape[1] for images in columns.values())
    scale = max(1, -(-_READABLE_PIXELS // tallest))
    cells = [_upscaled(images, tallest * scale) for images in columns.values()]
    widths = [cell.shape[2] for cell in cells]
    groups = np.concatenate([_pad(cell, *_RIGHT_OF_CELL) for cell in cells], axis=2)
    groups = _pad(groups, (0, 0), (0, 0), (0, _RIGHT_OF_GROUP), (0, 0))
    n, height, width, _ = groups.shape
    per_line = min(n, max(1, round(math.sqrt(n * height / width))))
    grid = make_grid(groups, per_line)
    title = np.full((_TITLE_PIXELS, grid.shape[1], 3), _BACKGROUND, dtype=np.uint8)
    for group in range(per_line):
        left = _GAP_PIXELS + group * (width + _GAP_PIXELS)
        for name, cell in zip(columns, widths, strict=True):
            title[:, left : left + cell] = _text(name, cell)
            left += cell + _RIGHT_OF_CELL[2][1]
    return np.concatenate([title, grid])


def _upscaled(images: Pixels, height: int) -> Pixels:
    """Return images as RGB of a larger height, their nearest pixels repeated."""
    n, h, w, _ = images.shape
    width = max(1, round(w * height / h))
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return np.broadcast_to(images[:, rows][:, :, columns], (n, height, width, 3))


def _text(name: str, width: int) -> Pixels:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, _TITLE_PIXELS), (_BACKGROUND,) * 3)
    ImageDraw.Draw(image).text((1, 1), name, fill=(0, 0, 0))
    return np.asarray(image)


def make_scatter(points: NDArray[np.floating[Any]], extent: float = 1.5, size: int = 384) -> Pixels:
    """Draw points [n, d ≥ 2] as black dots on white; return uint8 [size, size, 1].

    The square [−extent, extent]² of the first two coordinates is shown, the second growing upwards.
    """
    image = np.full((size, size, 1), _BACKGROUND, dtype=np.uint8)
    xy = points[:, :2]
    inside = xy[(np.abs(xy) < extent).all(axis=1)]  # NaN compares false
    # A dot is 2 × 2 pixels; a point that rounds to the edge keeps its dot inside.
    scaled = (inside + extent) / (2 * extent) * (size - 1)
    column, row = np.minimum(scaled.astype(np.int64), size - 2).T
    for right in (0, 1):
        for down in (0, 1):
            image[size - 2 - row + down, column + right] = 0
    return image


def encode_png(image: Pixels) -> bytes:
    """Encode uint8 [height, width, C], C of 1, 3 or 4, as PNG."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(encoded, "PNG")
    return encoded.getvalue()


def _pad(pixels: Pixels, *widths: tuple[int, int]) -> Pixels:
    return np.pad(pixels, widths, constant_values=_BACKGROUND)
