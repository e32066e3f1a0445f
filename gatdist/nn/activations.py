"""Leaky ReLU, with what precedes it, and derivatives of every order that read only signs.

On GPUs with Triton, scaling, bias, noise, activation and gain are one kernel, and so are all their
gradients. Elsewhere on GPUs, the activation is torch's, and its derivatives read its output.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gatdist.nn import fused
from gatdist.nn.derivatives import is_plain, needs_gradient


def leaky_relu(input: Tensor, negative_slope: float = 0.01, gain: float = 1.0) -> Tensor:
    """Return gain · x where x > 0, else gain · slope · x; slope ≥ 0, gain > 0.

    Computes what :func:`torch.nn.functional.leaky_relu` does; on GPUs with less memory and fewer
    operators. Its backward keeps the output, which the next layer keeps as well, or a bit for each
    number, and not the input. Its second derivative is zero, which torch's computes and adds. On
    CPUs torch's is faster.
    """
    if fused.fuses(input):
        return styled_leaky_relu(input, None, None, None, None, negative_slope, gain)
    if is_plain(input) or not torch.is_grad_enabled() or not input.requires_grad:
        return _leaky_relu(input, negative_slope, gain)
    found: Tensor = _LeakyReLU.apply(input, negative_slope, gain)  # type: ignore[no-untyped-call]
    return found


def styled_leaky_relu(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    negative_slope: float,
    gain: float = 1.0,
) -> Tensor:
    """Return gain · leaky ReLU(x · scale + bias + strength · noise) in one kernel.

    Only for ``x`` that :func:`gatdist.nn.fused.fuses`.

    Args:
        x: [n, c, h, w].
        scale: [n, c].
        bias: [c].
        noise: [n, 1, h, w], without a gradient; not copied if pixels of a sample are contiguous.
        strength: A scalar.
        negative_slope: At least 0.
        gain: Above 0.
    """
    n, c, h, w = x.shape
    assert scale is None or scale.shape == (n, c)
    assert bias is None or bias.shape == (c,)
    assert noise is None or noise.shape == (n, 1, h, w)
    x = fused.laid_out(x, fused.is_channels_last(x))
    scale, bias = (None if t is None else t.contiguous() for t in (scale, bias))
    if noise is not None and not noise[0].is_contiguous():
        noise = noise.contiguous()
    tensors = (x, scale, bias, noise, strength)
    found: Tensor
    if torch.is_grad_enabled():
        found = _Activation.apply(*tensors, negative_slope, gain)  # type: ignore[no-untyped-call]
    else:
        found, _ = fused.activate(*tensors, negative_slope, gain, False)
    return found


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        noise: Tensor | None,
        strength: Tensor | None,
        slope: float,
        gain: float,
    ) -> Tensor:
        y, signs = fused.activate(x, scale, bias, noise, strength, slope, gain, True)
        kept = x if scale is not None else None  # for the gradient by the scale
        ctx.save_for_backward(signs, kept, scale, bias, noise, strength)
        ctx.slope, ctx.gain, ctx.last = slope, gain, fused.is_channels_last(x)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint refuses to restore them again
        signs, x, scale, bias, noise, strength = saved
        grad = fused.laid_out(grad, ctx.last)
        missing = [0, *accumulate(t is None for t in saved[2:])]  # before each
        of_scale, of_bias, of_strength = (needs_gradient(ctx, i, missing[i - 1]) for i in (1, 2, 4))
        if torch.is_grad_enabled():
            g = masked(grad, signs, ctx.slope, ctx.gain, ctx.last)
            return (
                g if scale is None else g * scale[:, :, None, None],
                (g * x).sum((2, 3)).to(scale.dtype) if of_scale else None,
                g.sum((0, 2, 3)).to(bias.dtype) if of_bias else None,
                None,
                (g * noise).sum().to(strength.dtype) if of_strength else None,
                None,
                None,
            )
        read = x if of_scale else None, scale, noise if of_strength else None
        adds = of_scale or of_bias or of_strength
        g, sums = fused.activate_gradient(grad, signs, *read, ctx.slope, ctx.gain, adds)
        return (
            g,
            sums[:, :, 1].sum(1).to(scale.dtype) if of_scale else None,
            sums[:, :, 0].sum((0, 1)).to(bias.dtype) if of_bias else None,
            None,
            sums[:, :, 2].sum().to(strength.dtype) if of_strength else None,
            None,
            None,
        )


def masked(grad: Tensor, signs: Tensor, slope: float, gain: float, last: bool) -> Tensor:
    """Return ``grad`` times the derivative of an activation with these signs."""
    found: Tensor
    if torch.is_grad_enabled():
        found = _Masked.apply(grad, signs, slope, gain, last)  # type: ignore[no-untyped-call]
        return found
    grad = fused.laid_out(grad, last)
    found, _ = fused.activate_gradient(grad, signs, None, None, None, slope, gain, False)
    return found


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, signs: Tensor, slope: float, gain: float, last: bool
    ) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.rest = slope, gain, last
        return masked(grad, signs, slope, gain, last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (signs,) = ctx.saved_tensors
        return masked(grad, signs, *ctx.rest), None, None, None, None


def _leaky_relu(x: Tensor, slope: float, gain: float) -> Tensor:
    y = functional.leaky_relu(x, slope) if slope else x.relu()
    return y if gain == 1 else y * gain


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, gain: float) -> Tensor:
        y = _leaky_relu(x, slope, gain)
        ctx.save_for_backward(y)
        ctx.slope, ctx.gain = slope, gain
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return _gradient(grad, y.detach(), ctx.slope, ctx.gain), None, None


def _gradient(grad: Tensor, y: Tensor, slope: float, gain: float) -> Tensor:
    """Return the gradient by x, linear in ``grad``; ``y`` has the sign of x."""
    if not torch.is_grad_enabled():
        return _scaled(grad, y, slope, gain)
    found: Tensor = _Gradient.apply(grad, y, slope, gain)  # type: ignore[no-untyped-call]
    return found


def _scaled(grad: Tensor, y: Tensor, slope: float, gain: float) -> Tensor:
    if gain != 1:
        grad = grad * gain
    return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor, slope: float, gain: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.slope, ctx.gain = slope, gain
        return _scaled(grad, y, slope, gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        return _gradient(grad, y, ctx.slope, ctx.gain), None, None, None
