"""The residual networks of SNGAN (Miyato et al. 2018, appendix B.4; Miyato & Koyama 2018).

The generator has (conditional) batch normalization; the discriminator is meant to be spectrally
normalized: ``model.spectral_norm = ["discriminator"]``. Pictures that are halved three times from a
side of 32, such as CIFAR's, have the same width at all sizes, others double it with each halving.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.image.blocks import (
    BatchNorm,
    ConditionalBatchNorm,
    DownBlock,
    MakeNorm,
    ProjectionDiscriminator,
    UpBlock,
)
from gatdist.models.image.sizes import halvings, require_halvings
from gatdist.models.registry import discriminators, generators

_MOST_TIMES_WIDTH = 16


class SNGANGenerator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, H, W] in [−1, 1].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels from coarse to fine, one more than the picture is doubled.
    """

    def __init__(
        self, latent_size: int, sample_shape: tuple[int, ...], num_classes: int, widths: list[int]
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        times = len(widths) - 1
        self.start_shape = (widths[0], height >> times, width >> times)
        self.start = nn.Linear(latent_size, math.prod(self.start_shape))
        make_norm = _conditional(num_classes) if num_classes else BatchNorm
        self.blocks = nn.ModuleList(
            UpBlock(before, after, make_norm) for before, after in pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish = nn.Conv2d(widths[-1], channels, 3, padding=1)
        _initialize(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → pictures [n, C, H, W]."""
        x = self.start(latents).view(-1, *self.start_shape)
        for block in self.blocks:
            x = block(x, labels)
        return self.finish(functional.relu(self.norm(x))).tanh()


class SNGANDiscriminator(ProjectionDiscriminator):
    """Pictures [n, C, H, W] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels behind each block.
        num_halvings: the first so many blocks halve the picture.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        num_halvings: int,
    ) -> None:
        blocks = [
            DownBlock(
                before,
                after,
                halves=level < num_halvings,
                hidden=before if level else after,
                is_first=level == 0,
            )
            for level, (before, after) in enumerate(pairwise([sample_shape[0], *widths]))
        ]
        super().__init__(nn.Sequential(*blocks), widths[-1], num_classes)
        _initialize(self)


def _conditional(num_classes: int) -> MakeNorm:
    def make(channels: int) -> nn.Module:
        gain, bias = (nn.Embedding(num_classes, channels) for _ in range(2))
        for embedding in (gain, bias):
            nn.init.zeros_(embedding.weight)
        return ConditionalBatchNorm(channels, gain, bias)

    return make


def _initialize(network: nn.Module) -> None:
    """Glorot's uniform weights, by √2 larger where an activation follows, as in the paper."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = math.sqrt(2) if name.endswith(("first", "second")) else 1.0
            nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(network, SNGANDiscriminator) and network.embedding is not None:
        nn.init.xavier_uniform_(network.embedding.weight)


def _is_small(sample_shape: tuple[int, ...]) -> bool:
    return min(sample_shape[1:]) <= 32


@generators.register("sngan")
def sngan_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int | None = None,
) -> nn.Module:
    """``width`` channels next to the picture, doubling up to 16 × ``width`` at the coarsest.

    At sides up to 32 ``width`` channels everywhere. By default 64, there 256.
    """
    times = require_halvings(sample_shape, "sngan", least=2)
    if _is_small(sample_shape):
        widths = [width or 256] * (times + 1)
    else:
        base = width or 64
        # As published for 128 × 128, the coarsest width is there twice at most.
        widths = [base * min(2**level, _MOST_TIMES_WIDTH) for level in range(times + 1)][::-1]
    return SNGANGenerator(latent_size, sample_shape, num_classes, widths)


@discriminators.register("sngan")
def sngan_discriminator(
    *, sample_shape: tuple[int, ...], num_classes: int, width: int | None = None
) -> nn.Module:
    """``width`` channels next to the picture, doubling with each halving up to 16 × ``width``.

    At sides up to 32 ``width`` channels everywhere, and two halvings. By default 64, there 128.
    """
    times = require_halvings(sample_shape, "sngan", least=2)
    if _is_small(sample_shape):
        return SNGANDiscriminator(sample_shape, num_classes, [width or 128] * 4, 2)
    times = halvings((sample_shape[1], sample_shape[2]), 3)
    base = width or 64
    widths = [base * min(2**level, _MOST_TIMES_WIDTH) for level in range(times + 1)]
    return SNGANDiscriminator(sample_shape, num_classes, widths, times)
