"""Convolutions with a leaky ReLU, and residual blocks of them.

On GPUs with Triton, the bias is added by the activation's kernel, in whose gradient its own is
summed. Where a 1×1 convolution is limited by memory, it is one kernel with the activation or the
residual addition after it, and so are its gradients: see :func:`_widened` and :func:`_narrowed`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatdist.nn import fused
from gatdist.nn.activations import leaky_relu, masked, styled_leaky_relu
from gatdist.nn.casts import cast
from gatdist.nn.convolutions import Conv2d, Size, conv2d, pointwise_weight_gradient
from gatdist.nn.derivatives import needs_gradient


def conv2d_leaky_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size = 1,
    padding: Size = 0,
    groups: int = 1,
    *,
    negative_slope: float = 0.01,
    gain: float = 1.0,
) -> Tensor:
    """Return :func:`gatdist.nn.leaky_relu` of :func:`gatdist.nn.conv2d`, [n, c, h, w]."""
    slope = negative_slope
    if bias is not None and fused.fuses(input):
        x = conv2d(input, weight, None, stride, padding, 1, groups)
        return styled_leaky_relu(x, None, bias, None, None, slope, gain)
    return leaky_relu(conv2d(input, weight, bias, stride, padding, 1, groups), slope, gain)


def bottleneck(
    x: Tensor, widen: Conv2d, grouped: Conv2d, narrow: Conv2d, *, negative_slope: float
) -> Tensor:
    """Return x + narrow(act(grouped(act(widen(x))))), [n, c, h, w], with leaky ReLUs.

    ``widen`` and ``narrow`` are 1×1, without stride and padding; ``narrow`` has no bias.
    """
    slope, (weight, bias) = negative_slope, (widen.weight, widen.bias)
    assert isinstance(grouped.padding, tuple)
    middle = grouped.stride, grouped.padding
    if bias is None or grouped.bias is None or not fused.fuses_product(x, weight):
        wide = conv2d_leaky_relu(x, weight, bias, negative_slope=slope)
        wide = conv2d_leaky_relu(
            *(wide, grouped.weight, grouped.bias, *middle, grouped.groups), negative_slope=slope
        )
        return x + conv2d(wide, narrow.weight)
    wide, x = _Widened.apply(  # type: ignore[no-untyped-call]
        x, cast(weight, x.dtype), bias.contiguous(), slope
    )
    wide = conv2d(wide, grouped.weight, None, *middle, 1, grouped.groups)
    found, _ = _Narrowed.apply(  # type: ignore[no-untyped-call]
        wide, grouped.bias.contiguous(), cast(narrow.weight, x.dtype), x, slope
    )
    result: Tensor = found
    return result


class _Widened(torch.autograd.Function):
    """act(W x + b), and x itself for the residual addition, whose gradient is added to x's here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slope: float
    ) -> tuple[Tensor, Tensor]:
        y, signs, _ = fused.pointwise(x, weight, bias, None, None, slope, 1.0, True, False)
        ctx.save_for_backward(x, weight, bias, signs)
        ctx.slope = slope
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_residual: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, signs = ctx.saved_tensors
        of_bias = needs_gradient(ctx, 2)
        grad, of_residual = (fused.laid_out(g, True) for g in (grad, of_residual))
        if torch.is_grad_enabled():
            of_x, g = _WidenedGradient.apply(grad, of_residual, weight, signs, ctx.slope)  # type: ignore[no-untyped-call]
            total = g.sum((0, 2, 3)) if of_bias else None
        else:
            g, sums = fused.activate_gradient(
                grad, signs, None, None, None, ctx.slope, 1.0, of_bias
            )
            of_x = _product(g, weight.transpose(0, 1), of_residual)
            total = sums[:, :, 0].sum((0, 1)) if of_bias else None
        of_weight = pointwise_weight_gradient(g, x, weight) if needs_gradient(ctx, 1) else None
        return of_x, of_weight, None if total is None else total.to(bias.dtype), None


class _WidenedGradient(torch.autograd.Function):
    """The gradient by x of :class:`_Widened`: Wᵀ g + residual, and g = act' · grad."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, of_residual: Tensor, weight: Tensor, signs: Tensor, slope: float
    ) -> tuple[Tensor, Tensor]:
        g = masked(grad, signs, slope, 1.0, True)
        ctx.save_for_backward(g, weight, signs)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        return _product(g, weight.transpose(0, 1), of_residual), g

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_g: Tensor | None) -> tuple[Tensor | None, ...]:
        g, weight, signs = ctx.saved_tensors
        of_grad = of_weight = None
        if of_x is not None:
            of_x = fused.laid_out(of_x, True)
            of_grad = _masked_product(of_x, weight, signs, ctx.slope)
            if needs_gradient(ctx, 2):
                of_weight = pointwise_weight_gradient(g, of_x, weight)
        if of_g is not None:
            more = masked(of_g, signs, ctx.slope, 1.0, True)
            of_grad = more if of_grad is None else of_grad + more
        return of_grad, of_x, of_weight, None, None


class _Narrowed(torch.autograd.Function):
    """W z + residual, and z = act(x + b): derivatives of the weight's gradient go through it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, residual: Tensor, slope: float
    ) -> tuple[Tensor, Tensor]:
        x = fused.laid_out(x, True)
        z, signs = fused.activate(x, None, bias, None, None, slope, 1.0, True)
        ctx.save_for_backward(z, weight, bias, signs)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        return _product(z, weight, residual), z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_z: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, bias, signs = ctx.saved_tensors
        of_bias = needs_gradient(ctx, 1)
        back, of_x, of_weight, total = weight.transpose(0, 1), None, None, None
        if grad is not None:
            grad = fused.laid_out(grad, True)
            if of_z is None and not torch.is_grad_enabled():
                of_x, _, sums = fused.pointwise(
                    grad, back, None, None, signs, ctx.slope, 1.0, False, of_bias
                )
                total = sums.sum(0) if of_bias else None
            else:
                of_x = _masked_product(grad, back, signs, ctx.slope)
            if needs_gradient(ctx, 2):
                of_weight = pointwise_weight_gradient(grad, z, weight)
        if of_z is not None:
            more = masked(of_z, signs, ctx.slope, 1.0, True)
            of_x = more if of_x is None else of_x + more
        if of_bias and total is None and of_x is not None:
            total = of_x.sum((0, 2, 3))
        return of_x, None if total is None else total.to(bias.dtype), of_weight, grad, None


def _product(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    found: Tensor
    found, _, _ = fused.pointwise(x, weight, None, residual, None, 1.0, 1.0, False, False)
    return found


def _masked_product(x: Tensor, weight: Tensor, signs: Tensor, slope: float) -> Tensor:
    found: Tensor
    if torch.is_grad_enabled():
        found = _MaskedProduct.apply(x, weight, signs, slope)  # type: ignore[no-untyped-call]
        return found
    found, _, _ = fused.pointwise(x, weight, None, None, signs, slope, 1.0, False, False)
    return found


class _MaskedProduct(torch.autograd.Function):
    """act' · W x, where act' follows from signs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, signs: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x, weight, signs)
        ctx.slope = slope
        return _masked_product(x, weight, signs, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, signs = ctx.saved_tensors
        g = masked(grad, signs, ctx.slope, 1.0, True)
        of_x = of_weight = None
        if needs_gradient(ctx, 0):
            of_x = conv2d(g, weight.transpose(0, 1))
        if needs_gradient(ctx, 1):
            of_weight = pointwise_weight_gradient(g, x, weight)
        return of_x, of_weight, None, None
