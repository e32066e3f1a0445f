"""A small residual pair without normalization layers, for any height × width.

Pre-activation residual blocks (He et al. 2016) whose last convolution starts at zero, so that the
network starts as its skip path and needs no normalization (Zhang et al. 2019, "Fixup"). No layer
couples the samples of a batch, so the pair may be split over workers as one likes and serves the
one-stage step. Resolutions halve, rounded up, until the shorter side is at most 4; both networks
interpolate to exactly those sizes, so any height × width works.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.conditioning import embed_labels, to_logits
from gatdist.models.registry import discriminators, generators, require_rank

Output = Literal["tanh", "linear"]

_SLOPE = 0.2


def resolutions(height: int, width: int) -> list[tuple[int, int]]:
    """The picture's size and its halves, down to one whose shorter side is at most 4."""
    sizes = [(height, width)]
    while min(sizes[-1]) > 4:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _activate(x: Tensor) -> Tensor:
    # √2 / √(1 + slope²) keeps the variance of a unit normal input.
    return functional.leaky_relu(x, _SLOPE) * math.sqrt(2 / (1 + _SLOPE**2))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    if x.shape[2] == 2 * size[0] and x.shape[3] == 2 * size[1]:
        return functional.avg_pool2d(x, 2)
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


class _Convolution(nn.Conv2d):
    """A convolution that keeps the size, with variance-preserving weights times ``gain``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, gain: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.normal_(self.weight, std=gain / math.sqrt(inputs * kernel**2))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Block(nn.Module):
    """x + conv(act(conv(act(x)))); the skip path is a 1×1 convolution if the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _Convolution(inputs, outputs, 3)
        self.second = _Convolution(outputs, outputs, 3, gain=0.0)
        self.skip = (
            _Convolution(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.skip(x)
        change: Tensor = self.second(_activate(self.first(_activate(x))))
        return shortcut + change


class ResidualGenerator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, H, W], in [−1, 1] or about."""

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        max_width: int,
        blocks: int,
        output: Output,
    ) -> None:
        super().__init__()
        channels, height, image_width = sample_shape
        self.bound = torch.tanh if output == "tanh" else nn.Identity()
        self.sizes = resolutions(height, image_width)[::-1]  # from coarse to fine
        widths = [min(width * 2**level, max_width) for level in range(len(self.sizes))][::-1]
        self.start_shape = (widths[0], *self.sizes[0])
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.start = nn.Linear(latent_size, math.prod(self.start_shape))
        nn.init.normal_(self.start.weight, std=1 / math.sqrt(latent_size))
        nn.init.zeros_(self.start.bias)
        self.levels = nn.ModuleList(
            nn.Sequential(*[_Block(before if i == 0 else after, after) for i in range(blocks)])
            for before, after in zip([widths[0], *widths], widths, strict=False)
        )
        self.finish = _Convolution(widths[-1], channels, 3)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → pictures [n, C, H, W]."""
        latents = embed_labels(latents, labels, self.embedding)
        x = self.start(latents).view(-1, *self.start_shape)
        for size, level in zip(self.sizes, self.levels, strict=True):
            x = level(_resize(x, size))
        images: Tensor = self.bound(self.finish(_activate(x)))
        return images


class ResidualDiscriminator(nn.Module):
    """Pictures [n, C, H, W] → logits [n]; labels by projection (Miyato & Koyama 2018)."""

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        max_width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        channels, height, image_width = sample_shape
        self.sizes = resolutions(height, image_width)  # from fine to coarse
        widths = [min(width * 2**level, max_width) for level in range(len(self.sizes))]
        self.start = _Convolution(channels, widths[0], 3)
        self.levels = nn.ModuleList(
            nn.Sequential(*[_Block(before if i == 0 else after, after) for i in range(blocks)])
            for before, after in zip([widths[0], *widths], widths, strict=False)
        )
        features = widths[-1] * math.prod(self.sizes[-1])
        self.finish = nn.Linear(features, 1)
        nn.init.normal_(self.finish.weight, std=1 / math.sqrt(features))
        nn.init.zeros_(self.finish.bias)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures [n, C, H, W], labels int64 [n] if conditional → logits [n]."""
        x = self.start(samples)
        for size, level in zip(self.sizes, self.levels, strict=True):
            x = level(_resize(x, size))
        features = _activate(x).flatten(1)
        return to_logits(features, labels, self.finish, self.embedding)


@generators.register("residual")
def residual_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    max_width: int = 512,
    blocks: int = 1,
    output: Output = "tanh",
) -> nn.Module:
    """``blocks`` residual blocks a resolution.

    ``width`` channels at the finest, doubling up to ``max_width``. Pictures end in ``output``:
    ``tanh`` keeps them in [−1, 1], but has no slope left where most pixels are black or white;
    ``linear`` bounds nothing, as in StyleGAN2 (Karras et al. 2020).
    """
    require_rank(sample_shape, 3, "residual")
    return ResidualGenerator(
        latent_size, sample_shape, num_classes, width, max_width, blocks, output
    )


@discriminators.register("residual")
def residual_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    max_width: int = 512,
    blocks: int = 1,
) -> nn.Module:
    """``blocks`` residual blocks a resolution.

    ``width`` channels at the finest, doubling up to ``max_width``.
    """
    require_rank(sample_shape, 3, "residual")
    return ResidualDiscriminator(sample_shape, num_classes, width, max_width, blocks)
