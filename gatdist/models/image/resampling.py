"""Resampling with the filter [1, 3, 3, 1] in both axes and zero padding, as in StyleGAN2.

No depthwise convolutions, whose derivatives are slow: on CPUs shifted additions, on GPUs one kernel
of Triton, or averages over 2 × 2 pixels, of which the filter is a product of three. Each operator
is linear, and its adjoint is one of these operators too, so derivatives of every order cost as much
as a forward. All are deterministic, and keep the dtype and the memory format.

Legend: n samples, c channels, h × w pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gatdist.models.layers import without_autocast
from gatdist.nn import fuses, is_plain

_AXES = (2, 3)


def upsample(x: Tensor, gain: float = 1.0) -> Tensor:
    """Double the sides: zeros between pixels, then the filter with sum 4 · ``gain``.

    [n, c, h, w] → [n, c, 2h, 2w].
    """
    found: Tensor = _Upsample.apply(x, gain)  # type: ignore[no-untyped-call]
    return found


def downsample(x: Tensor, gain: float = 1.0) -> Tensor:
    """Halve the even sides: the filter with sum ``gain`` then every other pixel.

    [n, c, 2h, 2w] → [n, c, h, w].
    """
    found: Tensor = _Downsample.apply(x, gain)  # type: ignore[no-untyped-call]
    return found


def blur(x: Tensor, padding: int) -> Tensor:
    """Apply the filter with sum 1, with zero padding p from 0 to 3.

    [n, c, h, w] → [n, c, h + 2p − 3, w + 2p − 3].
    """
    found: Tensor = _Blur.apply(x, padding)  # type: ignore[no-untyped-call]
    return found


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        if fuses(x):
            return _fir(x, 2, 1, 2, 1, 4 * gain)
        if gain != 1:
            x = x * gain
        return _added_upsample(x) if is_plain(x) else _averaged_upsample(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return downsample(gradient, 4 * ctx.gain), None


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        if fuses(x):
            return _fir(x, 1, 2, 1, 1, gain)
        if is_plain(x):
            x = _added_downsample(x)
            return x if gain == 1 else x * gain
        x = functional.avg_pool2d(functional.avg_pool2d(x, 2, 1, 1), 2, 1)
        if (4 / gain).is_integer():
            return functional.avg_pool2d(x, 2, divisor_override=int(4 / gain))
        return functional.avg_pool2d(x, 2) * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return upsample(gradient, ctx.gain / 4), None


class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        return _fir(x, 1, 1, padding, padding, 1.0) if fuses(x) else _blurred(x, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return blur(gradient, 3 - ctx.padding), None


def _fir(x: Tensor, up: int, down: int, before: int, after: int, gain: float) -> Tensor:
    x = x.contiguous(memory_format=_layout(x))
    found: Tensor = torch.ops.gatdist.fir(x, up, down, before, after, gain)
    return found


def _averaged_upsample(x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    if _layout(x) == torch.channels_last:
        # The filter but for the borders, beyond which it sees their pixels again and not zeros.
        # Called below torch.nn.functional, which replaces it where determinism is required.
        with without_autocast(x.device.type):  # which would compute in float32
            x = torch.ops.aten.upsample_bilinear2d(x, [2 * h, 2 * w], False)
        x[:, :, :: 2 * h - 1].mul_(3 / 4)
        x[..., :: 2 * w - 1].mul_(3 / 4)
        return x
    # torch's kernel of the above for other layouts has one thread for all channels.
    with without_autocast(x.device.type):
        x = torch.ops.aten.upsample_nearest2d(x, [2 * h, 2 * w])
    return functional.avg_pool2d(functional.avg_pool2d(x, 2, 1, 1), 2, 1)


def _added_upsample(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    out = torch.empty(
        (n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=_layout(x)
    )
    for i, rows in enumerate(_between(x, 2)):
        for j, pixels in enumerate(_between(rows, 3)):
            out[:, :, i::2, j::2] = pixels
    return out


def _added_downsample(x: Tensor) -> Tensor:
    for axis in _AXES:
        half = x.shape[axis] // 2
        even, odd = _every_other(x, axis)
        x = (even + odd).mul_(3 / 8)
        x.narrow(axis, 1, half - 1).add_(odd.narrow(axis, 0, half - 1), alpha=1 / 8)
        x.narrow(axis, 0, half - 1).add_(even.narrow(axis, 1, half - 1), alpha=1 / 8)
    return x


def _blurred(x: Tensor, padding: int) -> Tensor:
    if not is_plain(x):
        for i in range(3):  # the padding first: what the others drop at the border stays dropped
            x = functional.avg_pool2d(x, 2, 1, 1 if i < padding else 0)
        return x
    x = functional.pad(x, [padding] * 4)
    for axis in _AXES:
        size = x.shape[axis] - 3
        first, second, third, fourth = (x.narrow(axis, k, size) for k in range(4))
        x = (second + third).mul_(3 / 8).add_(first, alpha=1 / 8).add_(fourth, alpha=1 / 8)
    return x


def _between(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return ¾ x_i + ¼ x_{i−1} and ¾ x_i + ¼ x_{i+1} along an axis: the two halves of pixel i."""
    size = x.shape[axis] - 1
    before = 3 / 4 * x
    after = before.clone()
    before.narrow(axis, 1, size).add_(x.narrow(axis, 0, size), alpha=1 / 4)
    after.narrow(axis, 0, size).add_(x.narrow(axis, 1, size), alpha=1 / 4)
    return before, after


def _every_other(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if axis == 2:
        return x[:, :, 0::2], x[:, :, 1::2]
    return x[..., 0::2], x[..., 1::2]


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
