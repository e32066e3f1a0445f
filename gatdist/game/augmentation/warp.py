"""Affine maps of the plane, and resampling of images by them.

Maps are [n, 3, 3] and act on columns (x, y, 1). Coordinates are in pixels from the middle of the
image, x to the right and y downwards. Images are [n, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.game.augmentation import filters


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products [n, 3, 3], never rounded to TF32."""
    return (a[:, :, :, None] * b[:, None]).sum(2)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)


def take(images: Tensor, index: Tensor) -> Tensor:
    """Return [n, C, …] with the pixels that ``index``, int64 [n, …], names by y · W + x."""
    flat = images.flatten(2)
    index, size = index.flatten(1), index.shape[1:]
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).unflatten(2, size)


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Return images whose pixel at q is the given image at ``sources`` · q.

    As in Karras et al. 2020 (ADA): the mirrored image is upsampled by 2 with the wavelet filter
    sym6, sampled bilinearly at twice the resolution, and downsampled with the same filter. Their
    image is continued as far as any sample of the batch needs, at most by W − 1 and H − 1 pixels
    (zeros beyond); here it is continued without end, so that no sample depends on another.

    Infinitely differentiable by the images, not by the maps. It uses gathers because grid_sample
    has no deterministic backward on CUDA, and no second derivative in older versions of torch.

    Args:
        images: float32 or float64.
        sources: Maps of the same dtype.
    """
    height, width = images.shape[2:]
    at, dtype = images.device, images.dtype
    up = [filters.on(at, dtype, filters.upsampling, size)[None, None] for size in (height, width)]
    down = [
        filters.on(at, dtype, filters.downsampling, size)[None, None] for size in (height, width)
    ]
    fine = filters.along_axes(images, *up)
    # Where the columns of `downsampling` are, from the middle of the image.
    y, x = (
        (torch.arange(matrix.shape[3], dtype=dtype, device=at) - (size + filters.HALF - 1)) / 2
        for matrix, size in zip(down, (height, width), strict=True)
    )
    maps = sources[:, :2, :, None, None]
    places = (maps[:, :, 0] * x + maps[:, :, 2]) + maps[:, :, 1] * y[:, None]  # [n, 2, h, w]
    left, over_x = _before(places[:, 0], width)
    above, over_y = _before(places[:, 1], height)
    stride = fine.shape[3]
    first = (above * stride + left)[:, None]  # [n, 1, h, w]
    corners = torch.cat([first, first + 1, first + stride, first + stride + 1], 1)
    shares = [(1 - over_y) * (1 - over_x), (1 - over_y) * over_x]
    shares += [over_y * (1 - over_x), over_y * over_x]
    found = torch.zeros((), dtype=dtype, device=at)
    for pixels, share in zip(take(fine, corners).unbind(2), shares, strict=True):
        found = torch.addcmul(found, pixels, share[:, None])
    return filters.along_axes(found, *down)[..., :height, :width]


def _before(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Index of the upsampled pixel before each place, and its distance to it, in [0, 1].

    ``place`` is a coordinate from the middle of an axis of ``size`` pixels; the distance is in
    upsampled pixels.
    """
    period = 2 * filters.period(size)
    place = 2 * place + (size - 1)
    place = place - (place / period).floor() * period  # may be rounded to the period
    before = place.floor().clamp(max=period - 1)
    return before.long(), place - before
