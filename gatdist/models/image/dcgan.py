"""DCGAN (Radford et al. 2016), for square images."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.layers import (
    Layer,
    doubling_widths,
    embed_labels,
    initialized,
    label_embedding,
    leaky_gain,
    to_logits,
)
from gatdist.models.registry import COARSEST, discriminators, generators, require_rank
from gatdist.nn import Conv2d, ConvTranspose2d, leaky_relu

Normalization = Literal["none", "batch"]

_SIDES = (16, 32, 64, 128)
_KERNEL, _STRIDE = 4, 2  # not the paper's 5: a stride of 2 covers 4 evenly
_SLOPE = 0.2
_PAPERS_STD = 0.02


def _widths(sample_shape: tuple[int, ...], width: int) -> list[int]:
    """Return channels from fine (side/2) to coarse (4); raise ConfigError for other sizes."""
    require_rank(sample_shape, 3, "dcgan")
    _, height, side = sample_shape
    if height != side or height not in _SIDES:
        nearest = min(_SIDES, key=lambda known: abs(math.log2(known / math.sqrt(height * side))))
        raise ConfigError(
            "data.resolution",
            f"'dcgan' takes square images of side {', '.join(map(str, _SIDES))}",
            value=[height, side],
            hint=f"Set it to {nearest}, or use the networks 'residual', which take any size",
        )
    return doubling_widths(width, (side // COARSEST).bit_length() - 1, 8 * width)


def _start(
    layer: Layer, normalization: Normalization, gain: float, fan_in: int | None = None
) -> Layer:
    if normalization == "none":
        return initialized(layer, gain, fan_in)
    # fan_in = 1: the gain is the standard deviation.
    return initialized(layer, _PAPERS_STD, 1)


def _norm(channels: int, normalization: Normalization) -> nn.Module:
    return nn.BatchNorm2d(channels) if normalization == "batch" else nn.Identity()


@generators.register("dcgan")
class DCGANGenerator(nn.Module):
    """DCGAN (Radford et al. 2016): latents [n, latent_size] → images [n, C, S, S] in [−1, 1].

    S is 16, 32, 64 or 128. ``width`` channels at the finest resolution, doubling per level up to
    8 × ``width``. 4 × 4 kernels instead of the paper's 5 × 5; ``normalization = "batch"`` is the
    paper's, ``none`` couples no samples. Labels, which the paper lacks, are embedded.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__()
        widths = _widths(sample_shape, width)[::-1]  # from coarse to fine
        biased = normalization == "none"  # batch normalization has a bias of its own
        self.embedding = label_embedding(num_classes, latent_size)
        start = nn.Linear(latent_size, widths[0] * COARSEST**2, bias=biased)
        self.start = _start(start, normalization, 1.0)
        self.start_shape = (widths[0], COARSEST, COARSEST)

        def doubling(before: int, after: int, bias: bool) -> nn.ConvTranspose2d:
            # Each output sees only every second input each way.
            fan_in = before * (_KERNEL // _STRIDE) ** 2
            layer = ConvTranspose2d(before, after, _KERNEL, _STRIDE, 1, bias=bias)
            return _start(layer, normalization, math.sqrt(2), fan_in)

        self.convolutions = nn.ModuleList(doubling(*pair, biased) for pair in pairwise(widths))
        self.finish = doubling(widths[-1], sample_shape[0], True)
        self.norms = nn.ModuleList(_norm(w, normalization) for w in widths)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        latents = embed_labels(latents, labels, self.embedding)
        x = self.start(latents).view(-1, *self.start_shape)
        for norm, convolution in zip(self.norms, [*self.convolutions, self.finish], strict=True):
            x = convolution(functional.relu(norm(x)))
        return torch.tanh(x)


@discriminators.register("dcgan")
class DCGANDiscriminator(nn.Module):
    """DCGAN (Radford et al. 2016): images [n, C, S, S] → logits [n].

    Options and differences from the paper as for the generator.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__()
        widths = _widths(sample_shape, width)  # from fine to coarse
        biased, gain = normalization == "none", leaky_gain(_SLOPE)
        self.convolutions = nn.ModuleList(
            _start(
                Conv2d(before, after, _KERNEL, _STRIDE, 1, bias=biased or level == 0),
                normalization,
                gain if level else 1.0,
            )
            for level, (before, after) in enumerate(pairwise([sample_shape[0], *widths]))
        )
        # The paper leaves the discriminator's first layer without normalization.
        self.norms = nn.ModuleList(
            _norm(w, normalization if level else "none") for level, w in enumerate(widths)
        )
        features = widths[-1] * COARSEST**2
        self.finish = _start(nn.Linear(features, 1), normalization, gain)
        self.embedding = label_embedding(num_classes, features)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        x = samples
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = leaky_relu(norm(convolution(x)), _SLOPE)
        return to_logits(x.flatten(1), labels, self.finish, self.embedding)
