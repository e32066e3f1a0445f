"""BigGAN (Brock et al. 2019, appendix B): wide residual networks with attention.

Each of the generator's blocks is told the class, and a part of the latent of its own. Both players
are meant to be spectrally normalized: ``model.spectral_norm = ["generator", "discriminator"]``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.image.blocks import (
    ConditionalBatchNorm,
    DownBlock,
    MakeNorm,
    ProjectionDiscriminator,
    SelfAttention,
    UpBlock,
)
from gatdist.models.image.sizes import require_halvings
from gatdist.models.registry import discriminators, generators

# Channels, as multiples of ``width``, by how often the picture is halved: behind the generator's
# start and blocks, from coarse to fine, and behind the discriminator's blocks, the last of which
# halves nothing.
_GENERATOR_WIDTHS = {
    3: [4, 4, 4, 4],
    4: [16, 16, 8, 4, 2],
    5: [16, 16, 8, 4, 2, 1],
    6: [16, 16, 8, 8, 4, 2, 1],
}
_DISCRIMINATOR_WIDTHS = {
    3: [2, 2, 2, 2],
    4: [1, 2, 4, 8, 16],
    5: [1, 2, 4, 8, 16, 16],
    6: [1, 2, 4, 8, 8, 16, 16],
}
# Where pictures are halved three times the discriminator halves twice, as in SNGAN.
_DISCRIMINATOR_HALVINGS = {3: 2, 4: 4, 5: 5, 6: 6}
# The shorter side of the feature maps that attend, by how often the picture is halved.
_ATTENTION_SIDES = {3: 16, 4: 32, 5: 64, 6: 64}


class BigGANGenerator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, H, W] in [−1, 1].

    Args:
        latent_size: numbers in a latent, a multiple of the number of blocks and one.
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels from coarse to fine, one more than there are blocks.
        label_size: numbers that tell a class.
        attention_side: the shorter side of the feature maps that attend.
    """

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        label_size: int,
        attention_side: int,
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        num_blocks = len(widths) - 1
        self.start_shape = (widths[0], height >> num_blocks, width >> num_blocks)
        self.part_size = latent_size // (num_blocks + 1)
        self.embedding = nn.Embedding(num_classes, label_size) if num_classes else None
        self.start = nn.Linear(self.part_size, math.prod(self.start_shape))
        make_norm = _conditional(self.part_size + (label_size if num_classes else 0))
        self.blocks = nn.ModuleList(
            UpBlock(before, after, make_norm) for before, after in pairwise(widths)
        )
        sides = [min(height, width) >> level for level in range(num_blocks)][::-1]
        self.attention = nn.ModuleDict(
            {
                str(i): SelfAttention(widths[i + 1])
                for i, side in enumerate(sides)
                if side == attention_side
            }
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish = nn.Conv2d(widths[-1], channels, 3, padding=1)
        _initialize(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → pictures [n, C, H, W]."""
        # One part for the start and each block: [n, parts · part_size] → parts of [n, part_size].
        first, *parts = latents.split(self.part_size, dim=1)
        if self.embedding is not None:
            assert labels is not None
            label = self.embedding(labels)  # [n, label_size]
            parts = [torch.cat([label, part], dim=1) for part in parts]
        x = self.start(first).view(-1, *self.start_shape)
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            x = block(x, part)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return self.finish(functional.relu(self.norm(x))).tanh()


class BigGANDiscriminator(ProjectionDiscriminator):
    """Pictures [n, C, H, W] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels behind each block.
        num_halvings: the first so many blocks halve the picture.
        attention_side: the shorter side of the feature maps that attend.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        num_halvings: int,
        attention_side: int,
    ) -> None:
        channels, height, width = sample_shape
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise([channels, *widths])):
            halves = level < num_halvings
            layers.append(
                DownBlock(before, after, halves=halves, hidden=after, is_first=level == 0)
            )
            if halves and min(height, width) >> (level + 1) == attention_side:
                layers.append(SelfAttention(after))
        super().__init__(nn.Sequential(*layers), widths[-1], num_classes)
        _initialize(self)


def _conditional(condition_size: int) -> MakeNorm:
    def make(channels: int) -> nn.Module:
        gain, bias = (nn.Linear(condition_size, channels, bias=False) for _ in range(2))
        return ConditionalBatchNorm(channels, gain, bias)

    return make


def _initialize(network: nn.Module) -> None:
    """Orthogonal weights, no biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.get_parameter("bias"))


def _halvings(sample_shape: tuple[int, ...]) -> int:
    return require_halvings(
        sample_shape, "biggan", least=min(_GENERATOR_WIDTHS), most=max(_GENERATOR_WIDTHS)
    )


@generators.register("biggan")
def biggan_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 96,
    label_size: int = 128,
    attention_side: int | None = None,
) -> nn.Module:
    """``width`` is the paper's ``ch``.

    ``attention_side``: the shorter side of the feature maps that attend; by default 16 for pictures
    of side 32, 32 for 64, 64 for larger ones.

    Raises:
        ConfigError: ``latent_size`` can't be cut into equal parts.
    """
    times = _halvings(sample_shape)
    parts = times + 1
    if latent_size % parts:
        raise ConfigError(
            "model.latent_size",
            f"must be a multiple of {parts}: 'biggan' gives each of its blocks a part",
            value=latent_size,
            hint=f"Set it to {max(1, round(latent_size / parts)) * parts}",
        )
    widths = [width * multiple for multiple in _GENERATOR_WIDTHS[times]]
    side = attention_side or _ATTENTION_SIDES[times]
    return BigGANGenerator(latent_size, sample_shape, num_classes, widths, label_size, side)


@discriminators.register("biggan")
def biggan_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 96,
    attention_side: int | None = None,
) -> nn.Module:
    """``width`` is the paper's ``ch``. ``attention_side``: as the generator's."""
    times = _halvings(sample_shape)
    widths = [width * multiple for multiple in _DISCRIMINATOR_WIDTHS[times]]
    side = attention_side or _ATTENTION_SIDES[times]
    return BigGANDiscriminator(
        sample_shape, num_classes, widths, _DISCRIMINATOR_HALVINGS[times], side
    )
