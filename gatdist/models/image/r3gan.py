"""The networks of R3GAN (Huang et al. 2024), the modern baseline without normalization.

Stages of residual blocks with inverted bottlenecks and grouped 3×3 convolutions, "fix-up"
initialization (Zhang et al. 2019), bilinear resampling between stages, and a learned 4×4 basis at
the coarse end of both networks. They go with the loss ``relativistic`` and the penalties ``r1`` and
``r2``. No layer couples the samples of a batch.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.conditioning import embed_labels, to_logits
from gatdist.models.image.sizes import require_halvings
from gatdist.models.registry import discriminators, generators

_SLOPE = 0.2
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))
_EXPANSION = 2


class _Block(nn.Module):
    """x + narrow(act(grouped(act(widen(x))))), the last of which starts at zero."""

    def __init__(self, width: int, groups: int, num_blocks: int) -> None:
        super().__init__()
        wide = _EXPANSION * width
        self.widen = nn.Conv2d(width, wide, 1)
        self.grouped = nn.Conv2d(wide, wide, 3, padding=1, groups=groups)
        self.narrow = nn.Conv2d(wide, width, 1, bias=False)
        # Fix-up: the two other layers of each of L blocks are scaled by L^(−1/4).
        gain = _GAIN * num_blocks**-0.25
        for layer in (self.widen, self.grouped):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
            nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [n, width, h, w] → the same shape."""
        change = functional.leaky_relu(self.widen(x), _SLOPE)
        change = functional.leaky_relu(self.grouped(change), _SLOPE)
        return x + self.narrow(change)


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1×1 convolution that keeps the variance."""
    layer = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs))
    return layer


def _transitions(widths: list[int]) -> nn.ModuleList:
    """What changes the width from each stage to the next."""
    return nn.ModuleList(
        nn.Identity() if before == after else _pointwise(before, after)
        for before, after in pairwise(widths)
    )


def _stages(widths: list[int], group_width: int, blocks: int) -> nn.ModuleList:
    """A stage of ``blocks`` blocks for each width; groups of ``group_width`` wide channels."""
    num_blocks = blocks * len(widths)
    return nn.ModuleList(
        nn.Sequential(
            *(_Block(width, _EXPANSION * width // group_width, num_blocks) for _ in range(blocks))
        )
        for width in widths
    )


class R3GANGenerator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, H, W], unbounded, in about [−1, 1].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels of each stage, from coarse to fine.
        group_width: wide channels in a group of the grouped convolutions.
        blocks: of a stage.
    """

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        group_width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        times = len(widths) - 1
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.basis = nn.Parameter(torch.randn(widths[0], height >> times, width >> times))
        self.start = nn.Linear(latent_size, widths[0], bias=False)
        nn.init.normal_(self.start.weight, std=1 / math.sqrt(latent_size))
        self.stages = _stages(widths, group_width, blocks)
        self.transitions = _transitions(widths)
        self.finish = _pointwise(widths[-1], channels)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → pictures [n, C, H, W]."""
        latents = embed_labels(latents, labels, self.embedding)
        x = self.basis * self.start(latents)[:, :, None, None]
        x = self.stages[0](x)
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = functional.interpolate(transition(x), scale_factor=2, mode="bilinear")
            x = stage(x)
        images: Tensor = self.finish(x)
        return images


class R3GANDiscriminator(nn.Module):
    """Pictures [n, C, H, W] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels of each stage, from fine to coarse.
        group_width: wide channels in a group of the grouped convolutions.
        blocks: of a stage.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        group_width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        times = len(widths) - 1
        size = height >> times, width >> times
        self.start = _pointwise(channels, widths[0])
        self.stages = _stages(widths, group_width, blocks)
        self.transitions = _transitions(widths)
        self.basis = nn.Parameter(torch.randn(widths[-1], *size) / math.sqrt(math.prod(size)))
        self.finish = nn.Linear(widths[-1], 1, bias=False)
        nn.init.normal_(self.finish.weight, std=1 / math.sqrt(widths[-1]))
        self.embedding = nn.Embedding(num_classes, widths[-1]) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures [n, C, H, W], labels int64 [n] if conditional → logits [n]."""
        x = self.stages[0](self.start(samples))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(functional.avg_pool2d(x, 2)))
        features = (x * self.basis).sum(dim=(2, 3))
        return to_logits(features, labels, self.finish, self.embedding)


def _widths(
    sample_shape: tuple[int, ...], width: int, max_width: int, group_width: int
) -> list[int]:
    """Channels of the stages from fine to coarse.

    Raises:
        ConfigError: a size that can't be halved, or a width that the groups do not divide.
    """
    times = require_halvings(sample_shape, "r3gan", least=1)
    widths = [min(width * 2**level, max_width) for level in range(times + 1)]
    for channels in widths:
        if _EXPANSION * channels % group_width:
            raise ConfigError(
                "model",
                f"group_width = {group_width} must divide {_EXPANSION} × {channels} channels of "
                "'r3gan'",
                hint="Use a power of two, and multiples of it as width and max_width",
            )
    return widths


@generators.register("r3gan")
def r3gan_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 96,
    max_width: int = 768,
    group_width: int = 16,
    blocks: int = 2,
) -> nn.Module:
    """``width`` channels at the finest stage, doubling up to ``max_width``.

    ``blocks`` residual blocks a stage; groups of ``group_width`` channels in their grouped
    convolutions. The defaults are the paper's for 256 × 256; with ``latent_size = 64``.
    """
    widths = _widths(sample_shape, width, max_width, group_width)[::-1]
    return R3GANGenerator(latent_size, sample_shape, num_classes, widths, group_width, blocks)


@discriminators.register("r3gan")
def r3gan_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 96,
    max_width: int = 768,
    group_width: int = 16,
    blocks: int = 2,
) -> nn.Module:
    """``width`` channels at the finest stage, doubling up to ``max_width``; see the generator."""
    widths = _widths(sample_shape, width, max_width, group_width)
    return R3GANDiscriminator(sample_shape, num_classes, widths, group_width, blocks)
