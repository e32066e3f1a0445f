"""SNGAN (Miyato et al. 2018) and BigGAN (Brock et al. 2019): residual networks, and their blocks.

Legend: n images, c channels, h × w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.layers import doubling_widths, label_embedding, to_logits
from gatdist.models.registry import discriminators, generators, halvings, require_halvings

# SNGAN's channels at the coarsest resolution, as a multiple of ``width``.
_MAX_MULTIPLE = 16
# BigGAN's channels as multiples of ``width``, by number of halvings: behind the generator's start
# and blocks, from coarse to fine; behind the discriminator's blocks, the last without halving.
_BIGGAN_GENERATOR = {
    3: [4, 4, 4, 4],
    4: [16, 16, 8, 4, 2],
    5: [16, 16, 8, 4, 2, 1],
    6: [16, 16, 8, 8, 4, 2, 1],
}
_BIGGAN_DISCRIMINATOR = {
    3: [2, 2, 2, 2],
    4: [1, 2, 4, 8, 16],
    5: [1, 2, 4, 8, 16, 16],
    6: [1, 2, 4, 8, 8, 16, 16],
}
# Of images that halve three times, the discriminator halves two, as in SNGAN.
_BIGGAN_HALVINGS = {3: 2, 4: 4, 5: 5, 6: 6}
# Shorter side of the feature maps with attention, by number of halvings.
_ATTENTION_SIDES = {3: 16, 4: 32, 5: 64, 6: 64}


# What a normalization is conditioned on: labels, vectors, or nothing.
Condition = Tensor | None
# Number of channels → normalization.
MakeNorm = Callable[[int], nn.Module]


class ConditionalBatchNorm(nn.Module):
    """Batch normalization whose gain and bias depend on the sample (de Vries et al. 2017).

    ``make`` builds the modules for the gain, added to 1, and the bias: n conditions → [n, c].
    """

    def __init__(self, channels: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = make(), make()

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        normalized: Tensor = self.norm(x)
        gain = 1 + self.gain(condition)[:, :, None, None]
        return normalized * gain + self.bias(condition)[:, :, None, None]


class BatchNorm(nn.Module):
    """Plain batch normalization, for blocks that may also be conditional."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return self.norm(x)


class UpBlock(nn.Module):
    """x [n, inputs, h, w] → [n, outputs, 2h, 2w], by two convolutions and a 1×1 skip path."""

    def __init__(self, inputs: int, outputs: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList([make_norm(inputs), make_norm(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        change = self.first(_double(functional.relu(self.norms[0](x, condition))))
        change = self.second(functional.relu(self.norms[1](change, condition)))
        # 1×1 convolution and upsampling commute; this order costs a quarter.
        shortcut: Tensor = _double(self.skip(x))
        return shortcut + change


class DownBlock(nn.Module):
    """x [n, inputs, h, w] → [n, outputs, h/2, w/2], or of the same size unless ``halves``.

    ``hidden`` channels between the two convolutions; no activation before ``is_first``.
    """

    def __init__(
        self, inputs: int, outputs: int, *, halves: bool, hidden: int, is_first: bool = False
    ) -> None:
        super().__init__()
        self.halves, self.is_first = halves, is_first
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if halves or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        start = x if self.is_first else functional.relu(x)
        change = self.second(functional.relu(self.first(start)))
        # Pooling and 1×1 convolution commute; this order costs a quarter.
        shortcut: Tensor = self.skip(functional.avg_pool2d(x, 2) if self.halves else x)
        return shortcut + (functional.avg_pool2d(change, 2) if self.halves else change)


class ProjectionDiscriminator(nn.Module):
    """Images [n, C, H, W] → blocks → [n, width, h, w], sum-pooled → logits [n]."""

    def __init__(self, blocks: nn.Sequential, width: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.finish = nn.Linear(width, 1)
        self.embedding = label_embedding(num_classes, width)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        features = functional.relu(self.blocks(samples)).sum(dim=(2, 3))
        return to_logits(features, labels, self.finish, self.embedding, scale=1.0)


class SelfAttention(nn.Module):
    """x + γ · attention of each pixel to a 2×2-pooled map (Zhang et al. 2019); γ starts at 0.

    Maps x [n, c, h, w] to the same shape; h and w are even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.finish = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        query = self.query(x).flatten(2)  # [n, c/8, hw]
        key = functional.max_pool2d(self.key(x), 2).flatten(2)  # [n, c/8, hw/4]
        value = functional.max_pool2d(self.value(x), 2).flatten(2)  # [n, c/2, hw/4]
        # Not scaled_dot_product_attention, which has no second derivative.
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)  # [n, hw, hw/4]
        seen = (value @ weights.transpose(1, 2)).unflatten(2, (height, width))
        return x + self.strength * self.finish(seen)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


@generators.register("sngan")
class SNGANGenerator(nn.Module):
    """SNGAN (Miyato et al. 2018): latents [n, latent_size] → images [n, C, H, W] in [−1, 1].

    Residual blocks with batch normalization, class-conditional with labels. ``width`` channels at
    the finest resolution, by default 64, doubling up to 16 × ``width``; up to a side of 32, as for
    CIFAR in the paper, ``width`` channels everywhere, by default 256.
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
            # As published for 128 × 128: the coarsest width occurs at most twice.
            widths = _doubling(width or 64, times)[::-1]
        self.start_shape = (widths[0], *(side >> times for side in sample_shape[1:]))
        self.start = nn.Linear(latent_size, math.prod(self.start_shape))
        make_norm = partial(_norm, num_classes)
        self.blocks = nn.ModuleList(UpBlock(*pair, make_norm) for pair in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish = nn.Conv2d(widths[-1], sample_shape[0], 3, padding=1)
        _initialize_sngan(self)

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
    32 two halvings with ``width`` channels everywhere, by default 128.
    """

    def __init__(
        self, *, sample_shape: tuple[int, ...], num_classes: int, width: int | None = None
    ) -> None:
        require_halvings(sample_shape, "sngan", least=2)
        if _is_small(sample_shape):
            times, widths = 2, [width or 128] * 4
        else:
            times = halvings((sample_shape[1], sample_shape[2]), 3)
            widths = _doubling(width or 64, times)
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
        super().__init__(nn.Sequential(*blocks), widths[-1], num_classes)
        _initialize_sngan(self)


def _is_small(sample_shape: tuple[int, ...]) -> bool:
    return min(sample_shape[1:]) <= 32


def _doubling(width: int, times: int) -> list[int]:
    return doubling_widths(width, times + 1, _MAX_MULTIPLE * width)


def _norm(num_classes: int, channels: int) -> nn.Module:
    if not num_classes:
        return BatchNorm(channels)
    return ConditionalBatchNorm(channels, partial(_zero_embedding, num_classes, channels))


def _zero_embedding(num_classes: int, channels: int) -> nn.Embedding:
    embedding = nn.Embedding(num_classes, channels)
    nn.init.zeros_(embedding.weight)
    return embedding


def _initialize_sngan(network: nn.Module) -> None:
    """Draw Glorot-uniform weights, with gain √2 where an activation follows, as in the paper."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = math.sqrt(2) if name.endswith(("first", "second")) else 1.0
            nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(network, SNGANDiscriminator) and network.embedding is not None:
        nn.init.xavier_uniform_(network.embedding.weight)


@generators.register("biggan")
class BigGANGenerator(nn.Module):
    """BigGAN (Brock et al. 2019): latents [n, latent_size] → images [n, C, H, W] in [−1, 1].

    The class and a part of the latent condition each block's batch normalization; ``latent_size``
    is a multiple of the number of blocks plus one. The paper's is spectrally normalized: set
    ``model.spectral_norm = ["generator", "discriminator"]``. ``width`` is the paper's ``ch``,
    ``label_size`` the size of the class embedding. ``attention_side``: shorter side of the feature
    maps with attention; by default 16 for images of side 32, 32 for 64, 64 above.

    Raises:
        ConfigError: ``latent_size`` does not split into equal parts.
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
        widths = [width * multiple for multiple in _BIGGAN_GENERATOR[times]]
        self.start_shape = (widths[0], *(side >> times for side in size))
        self.part_size = latent_size // parts
        self.embedding = label_embedding(num_classes, label_size)
        self.start = nn.Linear(self.part_size, math.prod(self.start_shape))
        condition_size = self.part_size + (label_size if num_classes else 0)

        def make_norm(channels: int) -> nn.Module:
            linear = partial(nn.Linear, condition_size, channels, bias=False)
            return ConditionalBatchNorm(channels, linear)

        self.blocks = nn.ModuleList(UpBlock(*pair, make_norm) for pair in pairwise(widths))
        attention_side = attention_side or _ATTENTION_SIDES[times]
        sides = [min(size) >> level for level in range(times)][::-1]
        self.attention = nn.ModuleDict(
            {
                str(i): SelfAttention(widths[i + 1])
                for i, side in enumerate(sides)
                if side == attention_side
            }
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.finish = nn.Conv2d(widths[-1], channels, 3, padding=1)
        _initialize_biggan(self)

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
        widths = [width * multiple for multiple in _BIGGAN_DISCRIMINATOR[times]]
        attention_side = attention_side or _ATTENTION_SIDES[times]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise([channels, *widths])):
            halves = level < _BIGGAN_HALVINGS[times]
            layers.append(
                DownBlock(before, after, halves=halves, hidden=after, is_first=level == 0)
            )
            if halves and min(size) >> (level + 1) == attention_side:
                layers.append(SelfAttention(after))
        super().__init__(nn.Sequential(*layers), widths[-1], num_classes)
        _initialize_biggan(self)


def _initialize_biggan(network: nn.Module) -> None:
    """Draw orthogonal weights; biases are zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.get_parameter("bias"))


def _halvings(sample_shape: tuple[int, ...]) -> int:
    return require_halvings(
        sample_shape, "biggan", least=min(_BIGGAN_GENERATOR), most=max(_BIGGAN_GENERATOR)
    )
