"""Affine maps of the plane, and resampling of images by them.

Maps are [n, 3, 3] and act on columns (x, y, 1). Coordinates are in pixels from the middle of the
image, x to the right and y downwards. Images are [n, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Return maps that move by (x, y) pixels, [n] each."""
    found = _identity(x)
    found[:, 0, 2], found[:, 1, 2] = x, y
    return found


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Return maps that scale by the factors x and y, [n] each; a negative factor mirrors."""
    found = _identity(x)
    found[:, 0, 0], found[:, 1, 1] = x, y
    return found


def rotation(angle: Tensor) -> Tensor:
    """Return maps that rotate by ``angle`` [n], in radians."""
    found = _identity(angle)
    found[:, 0, 0] = found[:, 1, 1] = angle.cos()
    found[:, 1, 0] = angle.sin()
    found[:, 0, 1] = -found[:, 1, 0]
    return found


def quarter_turn(count: Tensor, height: int, width: int) -> Tensor:
    """Return maps that rotate by ``count`` [n] quarters, pixel onto pixel.

    If H − W is odd, an odd number of quarters also moves by half a pixel: pixels would otherwise
    fall between pixels.
    """
    found = rotation(count * (torch.pi / 2)).round()
    if (height - width) % 2:
        found[:, :2, 2] = 0.5 * found[:, 1, 0].abs()[:, None]
    return found


def _identity(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)


def take(images: Tensor, index: Tensor) -> Tensor:
    """Return [n, C, H, W] with the pixels that ``index``, int64 [n, H, W], names by y · W + x."""
    flat = images.flatten(2)
    index = index.flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).view(images.shape)


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Return images whose pixel at q is the given image at ``sources`` · q.

    Bilinear, with mirrored images beyond the edges. Moves by whole pixels are exact for any H and
    W. Infinitely differentiable by the images, not by the maps. It uses gathers because grid_sample
    is exact only for some sizes, and has no second derivative in older versions of torch.

    Args:
        images: float32 or float64.
        sources: Maps of the same dtype.
    """
    height, width = images.shape[2:]
    maps = sources[:, :2, :, None, None]
    x = torch.arange(width, dtype=sources.dtype, device=sources.device) - (width - 1) / 2
    y = torch.arange(height, dtype=sources.dtype, device=sources.device) - (height - 1) / 2
    places = (maps[:, :, 0] * x + maps[:, :, 2]) + maps[:, :, 1] * y[:, None]  # [n, 2, H, W]
    left, right, over_x = _neighbours(places[:, 0], width)
    above, below, over_y = _neighbours(places[:, 1], height)
    found = torch.zeros((), dtype=images.dtype, device=images.device)
    for row, share_y in ((above * width, 1 - over_y), (below * width, over_y)):
        for column, share_x in ((left, 1 - over_x), (right, over_x)):
            share = (share_y * share_x)[:, None]
            found = torch.addcmul(found, take(images, row + column), share)
    return found


def _neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the pixels before and after each place, and its distance to the first, in [0, 1).

    ``place`` is a coordinate from the middle of an axis of ``size`` pixels.
    """
    # Measure from the edge; the image and its mirror image repeat with the period 2 size.
    place = place + size / 2
    place = place - (place / (2 * size)).floor() * (2 * size)
    place = (size - 0.5 - (place - size).abs()).clamp(0, size - 1)
    before = place.floor()
    index = before.long()
    return index, (index + 1).clamp(max=size - 1), place - before
