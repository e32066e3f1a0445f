"""The deep convolutional pair of Radford et al. 2016 (DCGAN), for square pictures.

Strided convolutions double the picture's side from 4 × 4, or halve it to that; there is no pooling
and no hidden dense layer. The kernels are 4 × 4 instead of the paper's 5 × 5, which two strides
cover evenly. ``normalization = "batch"`` is the paper's; ``none`` starts each layer so that it
keeps the variance of what goes through (He et al. 2015) and couples no samples, so that the pair
may be split over workers as one likes and serves the one-stage step.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.conditioning import embed_labels, to_logits
from gatdist.models.registry import discriminators, generators, require_rank

Normalization = Literal["none", "batch"]

_SIDES = (16, 32, 64, 128)
_COARSEST = 4  # side of the smallest feature maps
_KERNEL, _STRIDE = 4, 2
_SLOPE = 0.2
_PAPERS_STD = 0.02
_RELU_GAIN = math.sqrt(2)
_LEAKY_GAIN = math.sqrt(2 / (1 + _SLOPE**2))


def _widths(side: int, width: int) -> list[int]:
    """Channels of the feature maps from fine (side/2) to coarse (4), doubling up to 8 × width."""
    levels = (side // _COARSEST).bit_length() - 1
    return [width * 2 ** min(level, 3) for level in range(levels)]


def _start(layer: nn.Module, fan_in: int, gain: float, normalization: Normalization) -> nn.Module:
    """The layer with its first weights; ``fan_in`` inputs enter each output."""
    std = _PAPERS_STD if normalization == "batch" else gain / math.sqrt(fan_in)
    nn.init.normal_(layer.get_parameter("weight"), std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.get_parameter("bias"))
    return layer


def _norm(channels: int, normalization: Normalization) -> nn.Module:
    return nn.BatchNorm2d(channels) if normalization == "batch" else nn.Identity()


class DCGANGenerator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, S, S] in [−1, 1]."""

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        normalization: Normalization,
    ) -> None:
        super().__init__()
        channels, side, _ = sample_shape
        widths = _widths(side, width)[::-1]  # from coarse to fine
        biased = normalization == "none"  # batch normalization has a bias of its own
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.start = _start(
            nn.Linear(latent_size, widths[0] * _COARSEST**2, bias=biased),
            latent_size,
            1.0,
            normalization,
        )
        self.start_shape = (widths[0], _COARSEST, _COARSEST)
        # Each output of a strided transposed convolution sees only every second input each way.
        window = (_KERNEL // _STRIDE) ** 2
        self.convolutions = nn.ModuleList(
            _start(
                nn.ConvTranspose2d(before, after, _KERNEL, _STRIDE, 1, bias=biased),
                before * window,
                _RELU_GAIN,
                normalization,
            )
            for before, after in pairwise(widths)
        )
        self.finish = _start(
            nn.ConvTranspose2d(widths[-1], channels, _KERNEL, _STRIDE, 1),
            widths[-1] * window,
            _RELU_GAIN,
            normalization,
        )
        self.norms = nn.ModuleList(_norm(w, normalization) for w in widths)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → pictures [n, C, S, S]."""
        latents = embed_labels(latents, labels, self.embedding)
        x = self.start(latents).view(-1, *self.start_shape)
        for norm, convolution in zip(self.norms, [*self.convolutions, self.finish], strict=True):
            x = convolution(functional.relu(norm(x)))
        return torch.tanh(x)


class DCGANDiscriminator(nn.Module):
    """Pictures [n, C, S, S] → logits [n]; labels by projection (Miyato & Koyama 2018)."""

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        normalization: Normalization,
    ) -> None:
        super().__init__()
        channels, side, _ = sample_shape
        widths = _widths(side, width)  # from fine to coarse
        biased = normalization == "none"
        self.convolutions = nn.ModuleList(
            _start(
                nn.Conv2d(before, after, _KERNEL, _STRIDE, 1, bias=biased or level == 0),
                before * _KERNEL**2,
                _LEAKY_GAIN if level else 1.0,
                normalization,
            )
            for level, (before, after) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        # The paper leaves the discriminator's first layer without normalization.
        self.norms = nn.ModuleList(
            _norm(w, normalization if level else "none") for level, w in enumerate(widths)
        )
        features = widths[-1] * _COARSEST**2
        self.finish = _start(nn.Linear(features, 1), features, _LEAKY_GAIN, normalization)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures [n, C, S, S], labels int64 [n] if conditional → logits [n]."""
        x = samples
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.leaky_relu(norm(convolution(x)), _SLOPE)
        features = x.flatten(1)
        return to_logits(features, labels, self.finish, self.embedding)


def _require_side(sample_shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the pictures are square and of a side that doubling 4 reaches."""
    require_rank(sample_shape, 3, "dcgan")
    _, height, width = sample_shape
    if height != width or height not in _SIDES:
        nearest = min(_SIDES, key=lambda side: abs(math.log2(side / math.sqrt(height * width))))
        *most, last = map(str, _SIDES)
        raise ConfigError(
            "data.resolution",
            f"'dcgan' does square pictures of side {', '.join(most)} or {last}",
            value=[height, width],
            hint=f"Set it to {nearest}, or use the networks 'residual', which do any size",
        )


@generators.register("dcgan")
def dcgan_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    normalization: Normalization = "none",
) -> nn.Module:
    """``width`` channels next to the picture, doubling each level up to 8 × ``width``."""
    _require_side(sample_shape)
    return DCGANGenerator(latent_size, sample_shape, num_classes, width, normalization)


@discriminators.register("dcgan")
def dcgan_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    normalization: Normalization = "none",
) -> nn.Module:
    """``width`` channels next to the picture, doubling each level up to 8 × ``width``."""
    _require_side(sample_shape)
    return DCGANDiscriminator(sample_shape, num_classes, width, normalization)
