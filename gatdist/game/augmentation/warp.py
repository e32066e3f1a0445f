"""Affine maps of the plane, and resampling of images by them.

Maps are [n, 3, 3] and act on columns (x, y, 1). Coordinates are in pixels from the middle of the
image, x to the right and y downwards. Images are [n, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatdist.common.numerics import cached_tensors
from gatdist.game.augmentation import filters
from gatdist.nn import is_plain

# The first two rows of n maps; a number that is the same for all is a float.
Rows = tuple[Tensor | float, ...]


def translation(x: Tensor, y: Tensor) -> Rows:
    """Return maps that move by (x, y) pixels, [n] each."""
    return 1.0, 0.0, x, 0.0, 1.0, y


def scaling(x: Tensor, y: Tensor) -> Rows:
    """Return maps that scale by the factors x and y, [n] each; a negative factor mirrors."""
    return x, 0.0, 0.0, 0.0, y, 0.0


def rotation(angle: Tensor) -> Rows:
    """Return maps that rotate by ``angle`` [n], in radians."""
    cos, sin = angle.cos(), angle.sin()
    return cos, -sin, 0.0, sin, cos, 0.0


def matrices(maps: Sequence[Rows]) -> Sequence[Tensor]:
    """Return each of the maps as [n, 3, 3], all by one operator."""
    numbers = [number for rows in maps for number in (*rows, 0.0, 0.0, 1.0)]
    like = next(number for number in numbers if isinstance(number, Tensor))
    constants = {0.0: torch.zeros_like(like), 1.0: torch.ones_like(like)}
    each = [number if isinstance(number, Tensor) else constants[number] for number in numbers]
    return torch.stack(each, 1).unflatten(1, (len(maps), 3, 3)).unbind(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products [n, 3, 3], never rounded to TF32."""
    return (a[:, :, :, None] * b[:, None]).sum(2)


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

    Infinitely differentiable by the images, not by the maps. On CPUs and with deterministic
    algorithms it uses gathers, because grid_sample has no deterministic backward on CUDA.

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
    y, x = (
        _columns(at, dtype, size, matrix.shape[3])
        for matrix, size in zip(down, (height, width), strict=True)
    )
    if _may_interpolate(images):
        found = _interpolated(fine, sources, x, y, height, width)
    else:
        found = _gathered(fine, sources, x, y, height, width)
    return filters.along_axes(found, *down)[..., :height, :width]


@cached_tensors
def _columns(device: torch.device, dtype: torch.dtype, size: int, count: int) -> Tensor:
    """Return where the columns of `downsampling` are, from the middle of the image."""
    return (torch.arange(count, dtype=dtype, device=device) - (size + filters.HALF - 1)) / 2


def _gathered(
    fine: Tensor, sources: Tensor, x: Tensor, y: Tensor, height: int, width: int
) -> Tensor:
    """Return the upsampled images at ``sources`` · (x, y), by gathers."""
    maps = sources[:, :2, :, None, None]
    places = (maps[:, :, 0] * x + maps[:, :, 2]) + maps[:, :, 1] * y[:, None]  # [n, 2, h, w]
    left, over_x = _before(places[:, 0], width)
    above, over_y = _before(places[:, 1], height)
    stride = fine.shape[3]
    first = (above * stride + left)[:, None]  # [n, 1, h, w]
    corners = torch.cat([first, first + 1, first + stride, first + stride + 1], 1)
    shares = [(1 - over_y) * (1 - over_x), (1 - over_y) * over_x]
    shares += [over_y * (1 - over_x), over_y * over_x]
    found = torch.zeros((), dtype=fine.dtype, device=fine.device)
    for pixels, share in zip(take(fine, corners).unbind(2), shares, strict=True):
        found = torch.addcmul(found, pixels, share[:, None])
    return found


def _may_interpolate(images: Tensor) -> bool:
    """Return whether to use ``grid_sample``, whose backward is not deterministic on CUDA."""
    return not (is_plain(images) or torch.are_deterministic_algorithms_enabled())


def _interpolated(
    fine: Tensor, sources: Tensor, x: Tensor, y: Tensor, height: int, width: int
) -> Tensor:
    """Return what :func:`_gathered` does, with a tenth of the memory traffic."""
    factor, shift, period = _grid(fine.device, fine.dtype, (height, width), fine.shape[2:])
    maps = (factor * sources[:, :2])[:, None, None]
    along_x = maps[..., 0] * x[:, None] + (maps[..., 2] + shift)  # [n, 1, w, 2]
    along_y = maps[..., 1] * y[:, None, None]  # [n, h, 1, 2]
    grid = (along_x + along_y).remainder_(period).sub_(1)
    found: Tensor = _Interpolated.apply(fine, grid)  # type: ignore[no-untyped-call]
    return found


@cached_tensors
def _grid(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], fine: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what maps (x, y) to coordinates of ``grid_sample`` plus 1.

    They are 0 at the first pixel of the upsampled image and 2 at the last: a factor [2, 1], a shift
    [2], and the period [2] in which they repeat.
    """
    height, width = sizes
    unit = 2 / (torch.tensor(fine[::-1], dtype=torch.float64) - 1)  # an upsampled pixel
    shift = unit * torch.tensor([width - 1, height - 1])
    period = unit * torch.tensor([2 * filters.period(size) for size in (width, height)])
    factor, shift, period = (t.to(device, dtype) for t in ((2 * unit)[:, None], shift, period))
    return factor, shift, period


# Bilinear; beyond the border, where only rounding leads, its pixels; −1 is the first one's middle.
_MODE = 0, 1, True


class _Interpolated(torch.autograd.Function):
    """Linear in the images; torch's own has no second derivative on CUDA."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return torch.ops.aten.grid_sampler_2d(images, grid, *_MODE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _AdjointOfInterpolated.apply(grad, grid, ctx.shape), None  # type: ignore[no-untyped-call]


class _AdjointOfInterpolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        images = grad.new_empty(()).expand(shape)  # only their shape is used
        found, _ = torch.ops.aten.grid_sampler_2d_backward(
            grad, images, grid, *_MODE, [True, False]
        )
        assert isinstance(found, Tensor)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Interpolated.apply(grad, grid), None, None  # type: ignore[no-untyped-call]


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
