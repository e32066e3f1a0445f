"""Layers with equalized learning rates (Karras et al. 2018), and the filter that resampling needs.

Weights are drawn with unit variance and scaled where they are used, so that Adam, whose steps do
not know scales, moves all of them alike. Legend: n samples, c channels, h × w pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_TAPS = (1.0, 3.0, 3.0, 1.0)


class EqualizedLinear(nn.Module):
    """W x + b, [n, inputs] → [n, outputs].

    Args:
        inputs: numbers.
        outputs: numbers.
        bias: the first b.
        rate: multiplies the learning rate of both.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.gain, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return functional.linear(x, self.weight * self.gain, self.bias * self.rate)


class EqualizedConv2d(nn.Module):
    """A convolution, [n, inputs, h, w] → [n, outputs, h, w], or half of h and w with ``down``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, down: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain, self.down = 1 / math.sqrt(inputs * kernel**2), down
        # Blurred before every second pixel is taken, by as many taps each way as centre the result.
        self.blur = Blur(kernel // 2 + 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        padding = 0 if self.down else self.weight.shape[2] // 2
        stride = 2 if self.down else 1
        return functional.conv2d(self.blur(x), self.weight * self.gain, self.bias, stride, padding)


class Blur(nn.Module):
    """The filter [1, 3, 3, 1] both ways: [n, c, h, w] → [n, c, h + 2p − 3, w + 2p − 3].

    Args:
        padding: p, zeros at each side.
        gain: the filter's sum.
    """

    taps: Tensor

    def __init__(self, padding: int, gain: float = 1.0) -> None:
        super().__init__()
        taps = torch.tensor(_TAPS)
        taps = taps[:, None] * taps
        self.register_buffer("taps", taps * (gain / taps.sum()), persistent=False)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        channels = x.shape[1]
        taps = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        return functional.conv2d(x, taps, padding=self.padding, groups=channels)
