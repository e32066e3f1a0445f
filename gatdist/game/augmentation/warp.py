"""Geometry: affine maps of the plane, and pictures shown through them.

Coordinates are in pixels from the picture's middle, x to the right and y downwards, so that a map
means the same for pictures of any height and width.

Legend: n samples; pictures [n, C, H, W]; maps [n, 3, 3], which act on columns (x, y, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Maps [n, 3, 3] that move by (x, y) pixels, [n] each."""
    found = _identity(x)
    found[:, 0, 2], found[:, 1, 2] = x, y
    return found


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Maps [n, 3, 3] that stretch by the factors x and y, [n] each; a negative one mirrors."""
    found = _identity(x)
    found[:, 0, 0], found[:, 1, 1] = x, y
    return found


def rotation(angle: Tensor) -> Tensor:
    """Maps [n, 3, 3] that turn by ``angle`` [n], in radians."""
    return _rotation(angle.cos(), angle.sin())


def quarter_turn(count: Tensor, height: int, width: int) -> Tensor:
    """Maps [n, 3, 3] that turn by ``count`` [n] quarters, pixel onto pixel.

    The middles of the pixels of a 4 × 5 picture, turned about its middle, would fall between
    pixels; there an odd number of quarters moves by half a pixel as well.
    """
    angle = count * (torch.pi / 2)
    found = _rotation(angle.cos().round(), angle.sin().round())
    if (height - width) % 2:
        found[:, :2, 2] = 0.5 * found[:, 1, 0].abs()[:, None]
    return found


def _rotation(cosine: Tensor, sine: Tensor) -> Tensor:
    found = _identity(cosine)
    found[:, 0, 0], found[:, 0, 1] = cosine, -sine
    found[:, 1, 0], found[:, 1, 1] = sine, cosine
    return found


def _identity(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)


def take(images: Tensor, index: Tensor) -> Tensor:
    """Pixels by their number within each picture, y · W + x.

    Args:
        images: [n, C, H, W].
        index: int64 [n, H, W] in [0, H · W).

    Returns:
        [n, C, H, W], differentiable in the pictures as often as one likes.
    """
    flat = images.flatten(2)
    requested = index.flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, requested).view(images.shape)


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Pictures whose pixel at q shows what the given ones have at ``sources`` · q.

    Bilinear between pixels, and beyond the edges the mirror image. Moves by whole pixels are exact,
    for any H and W. Differentiable in the pictures as often as one likes, not in the maps.

    Made of gathers because grid_sample is exact only for some sizes, and has no second derivative
    in older versions of torch.

    Args:
        images: [n, C, H, W] of float32 or float64.
        sources: maps [n, 3, 3] of the same dtype.
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
    """The pixels before and after each place, int64, and how far it is on the way, in [0, 1).

    Args:
        place: along one axis, from the middle.
        size: pixels along it.
    """
    # From the edge, and over the mirror image beside the picture, which repeats with it.
    place = place + size / 2
    place = place - (place / (2 * size)).floor() * (2 * size)
    place = (size - 0.5 - (place - size).abs()).clamp(0, size - 1)
    before = place.floor()
    index = before.long()
    return index, (index + 1).clamp(max=size - 1), place - before
