"""A small residual pair without normalization layers, for any height × width.

Pre-activation residual blocks (He et al. 2016) whose last convolution starts at zero, so that the
network starts as its skip path (Zhang et al. 2019, "Fixup"). Resolutions halve, rounded up, until
the shorter side is at most 4; both networks interpolate to exactly those sizes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.layers import (
    doubling_widths,
    embed_labels,
    initialized,
    label_embedding,
    leaky_gain,
    to_logits,
)
from gatdist.models.registry import Size, discriminators, generators, require_rank
from gatdist.nn import Conv2d, has_derivatives_of_gpus, leaky_relu

Output = Literal["tanh", "linear"]

_SLOPE = 0.2


def _sizes(sample_shape: tuple[int, ...]) -> list[Size]:
    """Return heights and widths from fine to coarse, down to a shorter side of at most 4."""
    require_rank(sample_shape, 3, "residual")
    sizes = [(sample_shape[1], sample_shape[2])]
    while min(sizes[-1]) > 4:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _activate(x: Tensor) -> Tensor:
    return leaky_relu(x, _SLOPE, leaky_gain(_SLOPE))  # keeps the variance


def _resize(x: Tensor, size: Size) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    if x.shape[2] == 2 * size[0] and x.shape[3] == 2 * size[1]:
        return functional.avg_pool2d(x, 2)
    if has_derivatives_of_gpus(x):
        return interpolate(x, size)
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def interpolate(x: Tensor, size: Size) -> Tensor:
    """Interpolate x [n, c, h, w] bilinearly to another h and w, by one matrix per axis.

    It computes what torch's function of this name does without ``align_corners``, whose derivative
    adds with atomics on CUDA.
    """
    rows, columns = (
        functional.interpolate(
            torch.eye(before, dtype=x.dtype, device=x.device)[None], after, mode="linear"
        )[0]  # [before, after]
        for before, after in zip(x.shape[2:], size, strict=True)
    )
    return rows.T @ (x @ columns)


def _convolution(
    inputs: int, outputs: int, kernel: int, gain: float = 1.0, bias: bool = True
) -> nn.Conv2d:
    layer = Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    return initialized(layer, gain)


class _Block(nn.Module):
    """x + conv(act(conv(act(x)))); the skip path is a 1×1 convolution if the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3)
        self.second = _convolution(outputs, outputs, 3, gain=0.0)
        self.skip = (
            _convolution(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.skip(x)
        change: Tensor = self.second(_activate(self.first(_activate(x))))
        return shortcut + change


def _levels(widths: list[int], blocks: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(*[_Block(before if i == 0 else after, after) for i in range(blocks)])
        for before, after in zip([widths[0], *widths], widths, strict=False)
    )


@generators.register("residual")
class ResidualGenerator(nn.Module):
    """Residual network of any height × width: latents [n, latent_size] → images [n, C, H, W].

    ``blocks`` residual blocks per resolution; ``width`` channels at the finest, doubling up to
    ``max_width``. ``output``: ``tanh`` bounds images to [−1, 1], but its gradient vanishes where
    most pixels are black or white; ``linear`` is unbounded, as in StyleGAN2 (Karras et al. 2020).
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        max_width: int = 512,
        blocks: int = 1,
        output: Output = "tanh",
    ) -> None:
        super().__init__()
        self.bound = torch.tanh if output == "tanh" else nn.Identity()
        self.sizes = _sizes(sample_shape)[::-1]  # from coarse to fine
        widths = doubling_widths(width, len(self.sizes), max_width)[::-1]
        self.start_shape = (widths[0], *self.sizes[0])
        self.embedding = label_embedding(num_classes, latent_size)
        self.start = initialized(nn.Linear(latent_size, math.prod(self.start_shape)))
        self.levels = _levels(widths, blocks)
        self.finish = _convolution(widths[-1], sample_shape[0], 3)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        latents = embed_labels(latents, labels, self.embedding)
        x = self.start(latents).view(-1, *self.start_shape)
        for size, level in zip(self.sizes, self.levels, strict=True):
            x = level(_resize(x, size))
        return self.bound(self.finish(_activate(x)))


@discriminators.register("residual")
class ResidualDiscriminator(nn.Module):
    """Residual network of any height × width: images [n, C, H, W] → logits [n].

    ``width``, ``max_width`` and ``blocks`` as for the generator.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        max_width: int = 512,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.sizes = _sizes(sample_shape)  # from fine to coarse
        widths = doubling_widths(width, len(self.sizes), max_width)
        self.start = _convolution(sample_shape[0], widths[0], 3)
        self.levels = _levels(widths, blocks)
        features = widths[-1] * math.prod(self.sizes[-1])
        self.finish = initialized(nn.Linear(features, 1))
        self.embedding = label_embedding(num_classes, features)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(samples)
        for size, level in zip(self.sizes, self.levels, strict=True):
            x = level(_resize(x, size))
        features = _activate(x).flatten(1)
        return to_logits(features, labels, self.finish, self.embedding)
