"""Convolutions with efficient derivatives of every order.

torch computes the weight gradient in a convolution's double backward as a convolution with a kernel
of the size of the image, for each group by itself, for which cuDNN has no fast algorithm. On GPUs,
every derivative here is a convolution, a transposed convolution or a weight gradient, as in
StyleGAN2-ADA-PyTorch (Karras et al. 2020); on CPUs, torch's own are as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.nn.casts import cast
from gatdist.nn.derivatives import is_plain, needs_gradient

Size = int | Sequence[int]
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # by autocast


class _Form(NamedTuple):
    """Arguments of a convolution besides its tensors, each a list with one number per axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def adjoint(self, weight: Tensor, inputs: torch.Size, outputs: torch.Size) -> _Form:
        """Return the convolution from outputs to inputs with the same weight."""
        output_padding = [0] * len(self.stride)
        if not self.transposed:
            output_padding = [
                size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
                for size, out, stride, padding, dilation, kernel in zip(
                    inputs[2:],
                    outputs[2:],
                    self.stride,
                    self.padding,
                    self.dilation,
                    weight.shape[2:],
                    strict=True,
                )
            ]
        return self._replace(transposed=not self.transposed, output_padding=output_padding)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, form: _Form) -> Tensor:
    if is_plain(x) or not torch.is_grad_enabled():
        return torch.convolution(x, weight, bias, *form)
    found: Tensor = _Convolution.apply(x, weight, bias, form)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, form: _Form) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = form
        return torch.convolution(x, weight, bias, *form)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        form: _Form = ctx.form
        of_x = of_weight = of_bias = None
        if needs_gradient(ctx, 0):
            of_x = _convolve(grad, weight, None, form.adjoint(weight, x.shape, grad.shape))
        if needs_gradient(ctx, 1):
            of_weight = _WeightGradient.apply(grad, x, weight, form)  # type: ignore[no-untyped-call]
        if needs_gradient(ctx, 2):
            of_bias = grad.sum(dim=[0, *range(2, grad.dim())])
        return of_x, of_weight, of_bias, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, form: _Form) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.form, ctx.kernel = form, weight.detach()  # only its shape is read
        _, found, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *form, [False, True, False]
        )
        assert isinstance(found, Tensor)
        return found

    @staticmethod
    def backward(ctx: Any, grad_of_weight: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        form: _Form = ctx.form
        of_grad = of_x = None
        if needs_gradient(ctx, 0):
            of_grad = _convolve(x, grad_of_weight, None, form)
        if needs_gradient(ctx, 1):
            adjoint = form.adjoint(ctx.kernel, x.shape, grad.shape)
            of_x = _convolve(grad, grad_of_weight, None, adjoint)
        return of_grad, of_x, None, None


_POINTWISE = _Form([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def pointwise_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient by the weight of a 1×1 convolution of ``x``."""
    found: Tensor = _WeightGradient.apply(grad, x, weight, _POINTWISE)  # type: ignore[no-untyped-call]
    return found


def _of_axes(size: Size, axes: int) -> list[int]:
    return [size] * axes if isinstance(size, int) else list(size)


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    output_padding: Size | None = None,
) -> Tensor:
    """Convolve, transposed if ``output_padding`` is not None, in the dtype of autocast."""
    if x.dim() == weight.dim() - 1:  # a sample without a batch
        sizes = stride, padding, dilation, groups, output_padding
        return _call(x[None], weight, bias, *sizes)[0]
    axes = weight.dim() - 2
    form = _Form(
        stride=_of_axes(stride, axes),
        padding=_of_axes(padding, axes),
        dilation=_of_axes(dilation, axes),
        transposed=output_padding is not None,
        output_padding=_of_axes(output_padding or 0, axes),
        groups=groups,
    )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype) if x.dtype in _CAST else x
        weight = cast(weight, dtype) if weight.dtype in _CAST else weight
        bias = None if bias is None else cast(bias, weight.dtype)
    return _convolve(x, weight, bias, form)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """See :func:`torch.nn.functional.conv2d`; padding as numbers only."""
    return _call(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """See :func:`torch.nn.functional.conv_transpose2d`."""
    return _call(input, weight, bias, stride, padding, dilation, groups, output_padding)


# The number of axes is that of the weight.
conv1d, conv_transpose1d = conv2d, conv_transpose2d


def slow_layer(network: nn.Module) -> str | None:
    """Return the name of a convolution whose second derivatives are slow on GPUs, if any."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(
            module, _Convolutional | _Transposed
        ):
            return name
    return None


class _Convolutional(nn.modules.conv._ConvNd):
    """Calls :func:`_call` where torch's module would convolve."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return _call(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if is_plain(input):
            return super()._conv_forward(input, weight, bias)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = functional.pad(input, list(self._reversed_padding_repeated_twice), mode=mode)
        return _call(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class Conv1d(_Convolutional, nn.Conv1d):
    """See :class:`torch.nn.Conv1d`."""


class Conv2d(_Convolutional, nn.Conv2d):
    """See :class:`torch.nn.Conv2d`."""


class _Transposed(nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert isinstance(self.padding, tuple)
        sizes = (self.stride, self.padding, self.kernel_size, self.dilation)
        stride, padding, kernel, dilation = map(list, sizes)
        output_padding = self._output_padding(
            input, output_size, stride, padding, kernel, len(kernel), dilation
        )
        return _call(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            output_padding,
        )


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """See :class:`torch.nn.ConvTranspose1d`."""


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """See :class:`torch.nn.ConvTranspose2d`."""
