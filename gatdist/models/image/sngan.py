"""SNGAN (Miyato et al. 2018): residual networks with spectral normalization."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.image.blocks import (
    ConditionalBatchNorm,
    DownBlock,
    ProjectionDiscriminator,
    UpBlock,
)
from gatdist.models.layers import doubling_widths, glorot
from gatdist.models.registry import discriminators, generators, halvings, require_halvings
from gatdist.nn import Conv2d

# Channels at the coarsest resolution, as a multiple of ``width``.
_MAX_MULTIPLE = 16
_EPS = 2e-5  # of batch normalization, as in Chainer


@generators.register("sngan")
class SNGANGenerator(nn.Module):
    """SNGAN (Miyato et al. 2018): latents [n, latent_size] → images [n, C, H, W] in [−1, 1].

    Residual blocks with batch normalization, class-conditional with labels (Miyato & Koyama 2018).
    ``width`` channels at the finest resolution, by default 64, doubling up to 16 × ``width``; up to
    a side of 32, ``width`` channels everywhere, by default 256. Sides of 32, 48, 64, 128 and 256
    are those of the papers and their code.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int | None = None,
    ) -> None:
        super().__init__()
        times = require_halvings(sample_shape, "sngan", least=2)
        if _is_small(sample_shape):
            widths = [width or 256] * (times + 1)
        else:
            widths = _widths(width or 64, times)[::-1]
        self.start_shape = (widths[0], *(side >> times for side in sample_shape[1:]))
        self.start = nn.Linear(latent_size, math.prod(self.start_shape))
        make_norm = partial(_norm, num_classes)
        self.blocks = nn.ModuleList(UpBlock(*pair, make_norm) for pair in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1], _EPS)
        self.finish = Conv2d(widths[-1], sample_shape[0], 3, padding=1)
        _initialize(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(latents).view(-1, *self.start_shape)
        for block in self.blocks:
            x = block(x, labels)
        return self.finish(functional.relu(self.norm(x))).tanh()


@discriminators.register("sngan")
class SNGANDiscriminator(ProjectionDiscriminator):
    """SNGAN (Miyato et al. 2018): images [n, C, H, W] → logits [n].

    The paper's is spectrally normalized: set ``model.spectral_norm = ["discriminator"]``. ``width``
    channels at the finest resolution, by default 64, doubling up to 16 × ``width``; up to a side of
    32 two halvings with ``width`` channels everywhere, by default 128. The last block does not
    halve, but for 64 × 64.
    """

    def __init__(
        self, *, sample_shape: tuple[int, ...], num_classes: int, width: int | None = None
    ) -> None:
        require_halvings(sample_shape, "sngan", least=2)
        is_small = _is_small(sample_shape)
        if is_small:
            times, widths = 2, [width or 128] * 4
        else:
            times = halvings((sample_shape[1], sample_shape[2]), 3)
            widths = _widths(width or 64, times)
            if tuple(sample_shape[1:]) == (64, 64):
                times += 1
        blocks = [
            DownBlock(
                before,
                after,
                halves=level < times,
                hidden=before if level else after,
                is_first=level == 0,
            )
            for level, (before, after) in enumerate(pairwise([sample_shape[0], *widths]))
        ]
        super().__init__(nn.Sequential(*blocks), widths[-1], num_classes, bias=not is_small)
        _initialize(self)
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)


def _is_small(sample_shape: tuple[int, ...]) -> bool:
    return min(sample_shape[1:]) <= 32


def _widths(width: int, times: int) -> list[int]:
    """Return channels from fine to coarse."""
    if times == 6:  # as published for 256 × 256
        return [multiple * width for multiple in (1, 2, 4, 8, 8, 16, 16)]
    return doubling_widths(width, times + 1, _MAX_MULTIPLE * width)


def _norm(num_classes: int, channels: int) -> nn.Module:
    def zero_embedding() -> nn.Embedding:
        embedding = nn.Embedding(num_classes, channels)
        nn.init.zeros_(embedding.weight)
        return embedding

    return ConditionalBatchNorm(channels, zero_embedding if num_classes else None, _EPS)


def _initialize(network: nn.Module) -> None:
    """Draw Glorot-uniform weights, with gain √2 where an activation follows, as in the paper."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            glorot(module, math.sqrt(2) if name.endswith(("first", "second")) else 1.0)
