"""R3GAN (Huang et al. 2024), a baseline without normalization or style.

Stages of residual blocks with inverted bottlenecks and grouped 3×3 convolutions, "fix-up"
initialization (Zhang et al. 2019), resampling with [1, 3, 3, 1] between stages, and a learned 4×4
basis at the coarse end. Trained with the loss ``relativistic`` and the penalties ``r1`` and ``r2``.
Operators and initial weights are those of the authors' code.

Published configurations, as options (``blocks = 2`` in all):

========================  =====  =========  ===========
data                      width  max_width  group_width
========================  =====  =========  ===========
CIFAR-10, Stacked MNIST   768    768        16
FFHQ-64                   384    768        16
FFHQ-256                  96     768        16
ImageNet-32, ImageNet-64  1536   1536       32
========================  =====  =========  ===========
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.models.image.resampling import downsample, upsample
from gatdist.models.layers import (
    LabelLinear,
    doubling_widths,
    initialized,
    leaky_gain,
    to_conditional_logits,
    without_autocast,
)
from gatdist.models.registry import discriminators, generators, require_halvings
from gatdist.nn import Conv2d, bottleneck

_SLOPE = 0.2
_EXPANSION = 2


class _Block(nn.Module):
    """x + narrow(act(grouped(act(widen(x))))), [n, width, h, w]; ``narrow`` starts at zero."""

    def __init__(self, width: int, groups: int, num_blocks: int) -> None:
        super().__init__()
        wide = _EXPANSION * width
        self.widen = Conv2d(width, wide, 1)
        self.grouped = Conv2d(wide, wide, 3, padding=1, groups=groups)
        self.narrow = Conv2d(wide, width, 1, bias=False)
        for layer in (self.widen, self.grouped):
            # Fix-up: the other two layers of each of L blocks are scaled by L^(−1/4).
            initialized(layer, leaky_gain(_SLOPE) * num_blocks**-0.25)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        return bottleneck(x, self.widen, self.grouped, self.narrow, negative_slope=_SLOPE)


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return initialized(Conv2d(inputs, outputs, 1, bias=False))


def _embedding(num_classes: int, size: int, gain: float) -> LabelLinear | None:
    return initialized(LabelLinear(num_classes, size), gain) if num_classes else None


def _transition(before: int, after: int) -> nn.Module:
    """Return the 1×1 convolution that changes the width between stages."""
    return nn.Identity() if before == after else _pointwise(before, after)


def _stages(widths: list[int], group_width: int, blocks: int) -> nn.ModuleList:
    num_blocks = blocks * len(widths)
    return nn.ModuleList(
        nn.Sequential(
            *(_Block(width, _EXPANSION * width // group_width, num_blocks) for _ in range(blocks))
        )
        for width in widths
    )


def _widths(
    sample_shape: tuple[int, ...], width: int, max_width: int, group_width: int
) -> list[int]:
    """Return the stages' channels from coarse to fine, or raise ConfigError."""
    times = require_halvings(sample_shape, "r3gan", least=1)
    widths = doubling_widths(width, times + 1, max_width)
    for channels in widths:
        if _EXPANSION * channels % group_width:
            raise ConfigError(
                "model",
                f"group_width = {group_width} must divide {_EXPANSION} × {channels} channels of "
                "'r3gan'",
                hint="Use a power of two, and multiples of it as width and max_width",
            )
    return widths[::-1]


class _Mixed(nn.Module):
    """A network whose coarsest stages compute in the dtype of their weights, also under autocast.

    Other stages get their inputs in the dtype of autocast, so that sums of blocks have it too.

    Stages and transitions are numbered from the coarsest, so that the same weights have the same
    names at any resolution.
    """

    basis: nn.Parameter

    def __init__(self, full_precision_stages: int) -> None:
        super().__init__()
        if full_precision_stages < 0:
            key = "model: full_precision_stages"
            raise ConfigError(key, "must be at least 0", value=full_precision_stages)
        self.full_precision_stages = full_precision_stages

    def at(self, stage: int, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply layers of a stage in its precision."""
        kind = x.device.type
        if stage < self.full_precision_stages:
            with without_autocast(kind):
                return layers(x.to(self.basis.dtype))
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return layers(x)


@generators.register("r3gan")
class R3GANGenerator(_Mixed):
    """R3GAN (Huang et al. 2024): latents [n, latent_size] → images [n, C, H, W], unbounded.

    ``blocks`` residual blocks per stage; ``width`` channels at the finest stage, doubling up to
    ``max_width``; ``group_width`` channels in each group of the grouped convolutions. The defaults
    are the paper's for 256 × 256, with ``latent_size = 64``. The ``full_precision_stages`` coarsest
    stages do without autocast. Embedded labels, ``latent_size`` numbers each, are appended to the
    latents.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 96,
        max_width: int = 768,
        group_width: int = 16,
        blocks: int = 2,
        full_precision_stages: int = 0,
    ) -> None:
        super().__init__(full_precision_stages)
        widths = _widths(sample_shape, width, max_width, group_width)
        size = [side >> (len(widths) - 1) for side in sample_shape[1:]]
        self.embedding = _embedding(num_classes, latent_size, gain=1.0)
        self.basis = nn.Parameter(torch.randn(widths[0], *size))
        inputs = latent_size * (2 if num_classes else 1)
        self.start = initialized(nn.Linear(inputs, widths[0], bias=False))
        self.stages = _stages(widths, group_width, blocks)
        self.transitions = nn.ModuleList(_transition(*pair) for pair in pairwise(widths))
        self.finish = _pointwise(widths[-1], sample_shape[0])

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            latents = torch.cat([latents, self.embedding(labels)], dim=1)
        x = self.basis * self.at(0, self.start, latents)[:, :, None, None]
        x = self.at(0, self.stages[0], x)
        for i, (widen, stage) in enumerate(zip(self.transitions, self.stages[1:], strict=True), 1):
            x = self.at(i, stage, upsample(self.at(i, widen, x)))
        return self.finish(x)


@discriminators.register("r3gan")
class R3GANDiscriminator(_Mixed):
    """R3GAN (Huang et al. 2024): images [n, C, H, W] → logits [n]; options as for the generator.

    A class-conditional logit is the product of an output per coarsest channel with the embedded
    label.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 96,
        max_width: int = 768,
        group_width: int = 16,
        blocks: int = 2,
        full_precision_stages: int = 0,
    ) -> None:
        super().__init__(full_precision_stages)
        widths = _widths(sample_shape, width, max_width, group_width)
        coarsest = widths[0]
        size = [side >> (len(widths) - 1) for side in sample_shape[1:]]
        self.start = _pointwise(sample_shape[0], widths[-1])
        self.stages = _stages(widths, group_width, blocks)
        self.transitions = nn.ModuleList(
            _transition(before, after) for after, before in pairwise(widths)
        )
        self.basis = nn.Parameter(torch.randn(coarsest, *size) / math.sqrt(math.prod(size)))
        outputs = coarsest if num_classes else 1
        self.finish = initialized(nn.Linear(coarsest, outputs, bias=False))
        self.embedding = _embedding(num_classes, outputs, gain=outputs**-0.5)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(samples)
        for i in reversed(range(1, len(self.stages))):
            x = downsample(self.at(i, self.stages[i], x))
            x = self.at(i, self.transitions[i - 1], x)
        x = self.at(0, self.stages[0], x)
        features = (x * self.basis).sum(dim=(2, 3))
        embedded = None if self.embedding is None else self.embedding(labels)
        return to_conditional_logits(features, embedded, self.finish)
