"""BigGAN (Brock et al. 2019): residual networks with self-attention and a latent per block."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.image.blocks import (
    ConditionalBatchNorm,
    DownBlock,
    ProjectionDiscriminator,
    UpBlock,
)
from gatdist.models.layers import label_embedding
from gatdist.models.registry import discriminators, generators, require_halvings
from gatdist.nn import Conv2d

# Channels as multiples of ``width``, by number of halvings: behind the generator's start
# and blocks, from coarse to fine; behind the discriminator's blocks, the last without halving.
# 5 to 7 (sides of 128 to 512): Brock et al. 2019, appendix B. 4: BigGAN-PyTorch. 3: StudioGAN
# (Kang et al. 2023) for CIFAR-10.
_GENERATOR = {
    3: [4, 4, 4, 4],
    4: [16, 16, 8, 4, 2],
    5: [16, 16, 8, 4, 2, 1],
    6: [16, 16, 8, 8, 4, 2, 1],
    7: [16, 16, 8, 8, 4, 2, 1, 1],
}
_DISCRIMINATOR = {
    3: [2, 2, 2, 2],
    4: [1, 2, 4, 8, 16],
    5: [1, 2, 4, 8, 16, 16],
    6: [1, 2, 4, 8, 8, 16, 16],
    7: [1, 1, 2, 4, 8, 8, 16, 16],
}
# Of images that halve three times, the discriminator halves two, as in SNGAN.
_NUM_HALVINGS = {3: 2, 4: 4, 5: 5, 6: 6, 7: 7}
# Shorter side of the feature maps with attention, by number of halvings.
_ATTENTION_SIDES = {3: 16, 4: 32, 5: 64, 6: 64, 7: 64}


class SelfAttention(nn.Module):
    """x + γ · attention of each pixel to a 2×2-pooled map (Zhang et al. 2019); γ starts at 0.

    Maps x [n, c, h, w] to the same shape; h and w are even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = Conv2d(channels, channels // 8, 1, bias=False)
        self.key = Conv2d(channels, channels // 8, 1, bias=False)
        self.value = Conv2d(channels, channels // 2, 1, bias=False)
        self.finish = Conv2d(channels // 2, channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        query = self.query(x).flatten(2)  # [n, c/8, hw]
        key = max_pool(self.key(x)).flatten(2)  # [n, c/8, hw/4]
        value = max_pool(self.value(x)).flatten(2)  # [n, c/2, hw/4]
        # Not scaled_dot_product_attention, which has no second derivative.
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)  # [n, hw, hw/4]
        seen = (value @ weights.transpose(1, 2)).unflatten(2, (height, width))
        return x + self.strength * self.finish(seen)


def max_pool(x: Tensor) -> Tensor:
    """Maximum of each 2×2 pixels: [n, c, 2h, 2w] → [n, c, h, w].

    As in torch's, the first of equal pixels gets the gradient; but torch's adds with atomics on
    CUDA.
    """
    x = _larger(x[..., 0::2], x[..., 1::2])
    return _larger(x[:, :, 0::2], x[:, :, 1::2])


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b > a) | b.isnan(), b, a)


@generators.register("biggan")
class BigGANGenerator(nn.Module):
    """BigGAN (Brock et al. 2019): latents [n, latent_size] → images [n, C, H, W] in [−1, 1].

    The class and a part of the latent condition each block's batch normalization; ``latent_size``
    is a multiple of the number of blocks plus one. The paper's is spectrally normalized: set
    ``model.spectral_norm = ["generator", "discriminator"]``; the generator's class embedding is
    exempt, as in BigGAN-PyTorch. ``width`` is the paper's ``ch``, ``label_size`` the size of the
    class embedding. ``attention_side``: shorter side of the feature maps with attention; by default
    16 for images of side 32, 32 for 64, 64 above. Sides of 128, 256 and 512 are the paper's.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 96,
        label_size: int = 128,
        attention_side: int | None = None,
    ) -> None:
        super().__init__()
        times = _halvings(sample_shape)
        parts = times + 1
        if latent_size % parts:
            raise ConfigError(
                "model.latent_size",
                f"must be a multiple of {parts}: each block of 'biggan' takes a part",
                value=latent_size,
                hint=f"Set it to {max(1, round(latent_size / parts)) * parts}",
            )
        channels, *size = sample_shape
        widths = [width * multiple for multiple in _GENERATOR[times]]
        self.start_shape = (widths[0], *(side >> times for side in size))
        self.part_size = latent_size // parts
        self.embedding = label_embedding(num_classes, label_size)
        if self.embedding is not None:
            self.embedding.spectral_norm = False  # type: ignore[assignment]
        self.start = nn.Linear(self.part_size, math.prod(self.start_shape))
        condition_size = self.part_size + (label_size if num_classes else 0)

        def make_norm(channels: int) -> nn.Module:
            linear = partial(nn.Linear, condition_size, channels, bias=False)
            return ConditionalBatchNorm(channels, linear)

        self.blocks = nn.ModuleList(UpBlock(*pair, make_norm) for pair in pairwise(widths))
        if attention_side is None:
            attention_side = _ATTENTION_SIDES[times]
        sides = [min(size) >> level for level in range(times)][::-1]
        self.attention = nn.ModuleDict(
            {
                str(i): SelfAttention(widths[i + 1])
                for i, side in enumerate(sides)
                if side == attention_side
            }
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish = Conv2d(widths[-1], channels, 3, padding=1)
        _initialize(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
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


@discriminators.register("biggan")
class BigGANDiscriminator(ProjectionDiscriminator):
    """BigGAN (Brock et al. 2019): images [n, C, H, W] → logits [n].

    ``width`` and ``attention_side`` as for the generator.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 96,
        attention_side: int | None = None,
    ) -> None:
        times = _halvings(sample_shape)
        channels, *size = sample_shape
        widths = [width * multiple for multiple in _DISCRIMINATOR[times]]
        if attention_side is None:
            attention_side = _ATTENTION_SIDES[times]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise([channels, *widths])):
            halves = level < _NUM_HALVINGS[times]
            layers.append(
                DownBlock(before, after, halves=halves, hidden=after, is_first=level == 0)
            )
            if halves and min(size) >> (level + 1) == attention_side:
                layers.append(SelfAttention(after))
        super().__init__(nn.Sequential(*layers), widths[-1], num_classes)
        _initialize(self)


def _initialize(network: nn.Module) -> None:
    """Draw orthogonal weights; biases are zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.get_parameter("bias"))


def _halvings(sample_shape: tuple[int, ...]) -> int:
    return require_halvings(sample_shape, "biggan", least=min(_GENERATOR), most=max(_GENERATOR))
