"""HiFi-GAN (Kong et al. 2020): a generator from log-mel spectrograms, and its discriminators.

Legend: n clips, b bands, f frames, t samples in time, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from gatdist.common.errors import ConfigError
from gatdist.models.layers import add_spectral_norm
from gatdist.models.registry import (
    discriminators,
    generators,
    require_input,
    require_no_labels,
    require_rank,
)
from gatdist.nn import Conv1d, Conv2d, ConvTranspose1d

_SLOPE = 0.1
_LAST_SLOPE = 0.01  # before the last convolution, as in the published code
_STD = 0.01  # of initial weights
_GROUPS = 16  # of most convolutions of a scale


class Version(NamedTuple):
    """Hyperparameters of a published generator.

    Attributes:
        upsampling: Strides of the transposed convolutions, of twice as many taps.
        width: Channels before the first of them; each halves the channels.
        kernels: Of the residual blocks behind each of them, whose outputs are averaged.
        dilations: Of each block's convolutions.
        convolves_twice: Whether a second, undilated convolution follows each of these.
    """

    upsampling: tuple[int, ...]
    width: int
    kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    convolves_twice: bool


_V1 = Version((8, 8, 2, 2), 512, (3, 7, 11), ((1, 3, 5),) * 3, True)
VERSIONS = {
    "v1": _V1,
    "v2": _V1._replace(width=128),
    "v3": Version((8, 8, 4), 256, (3, 5, 7), ((1, 2), (2, 6), (3, 12)), False),
}


@generators.register("hifigan")
class HiFiGANGenerator(nn.Module):
    """Log-mel spectrograms [n, b, f] → clips [n, 1, f · hop] in [−1, 1].

    ``version`` is "v1", "v2" or "v3" of the paper. ``upsampling``: strides whose product is the
    hop, instead of the published ones for a hop of 256. ``width``: channels before the first of
    them, instead of the published number.
    """

    modalities = ("audio",)

    def __init__(
        self,
        *,
        input_shapes: tuple[tuple[int, ...], ...],
        sample_shape: tuple[int, ...],
        num_classes: int,
        version: Literal["v1", "v2", "v3"] = "v1",
        upsampling: list[PositiveInt] | None = None,
        width: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        require_no_labels(num_classes, "hifigan")
        bands, frames = require_input(input_shapes, 2, "spectrogram [bands, frames]", "hifigan")
        found = VERSIONS[version]
        strides = tuple(upsampling or found.upsampling)
        if math.prod(strides) * frames != sample_shape[1]:
            raise ConfigError(
                "model.generator.upsampling",
                f"must have the product {sample_shape[1] // frames}, the hop of the spectrograms",
                value=list(strides),
            )
        if width is not None and width < 2 ** len(strides):
            rule = f"must be at least {2 ** len(strides)}: each of the strides halves it"
            raise ConfigError("model.generator.width", rule, value=width)
        widths = [(width or found.width) // 2**level for level in range(len(strides) + 1)]
        self.begin = weight_norm(Conv1d(bands, widths[0], 7, padding=3))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for stride, (before, after) in zip(strides, pairwise(widths), strict=True):
            padding, extra = (stride + 1) // 2, stride % 2
            up = ConvTranspose1d(
                before, after, 2 * stride, stride, padding=padding, output_padding=extra
            )
            self.ups.append(_normal(up))
            self.blocks.append(
                nn.ModuleList(
                    _Block(after, kernel, dilations, found.convolves_twice)
                    for kernel, dilations in zip(found.kernels, found.dilations, strict=True)
                )
            )
        self.finish = _normal(Conv1d(widths[-1], sample_shape[0], 7, padding=3))

    def forward(self, mel: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.begin(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, _SLOPE))
            x = torch.stack([block(x) for block in cast("nn.ModuleList", blocks)]).mean(0)
        return torch.tanh(self.finish(functional.leaky_relu(x, _LAST_SLOPE)))


class _Block(nn.Module):
    """Residual dilated convolutions ("multi-receptive field fusion"): [n, c, t] → [n, c, t]."""

    def __init__(self, width: int, kernel: int, dilations: Sequence[int], twice: bool) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Module:
            padding = dilation * (kernel - 1) // 2
            return _normal(Conv1d(width, width, kernel, padding=padding, dilation=dilation))

        self.dilated = nn.ModuleList(map(convolution, dilations))
        self.plain = nn.ModuleList(convolution(1) for _ in dilations) if twice else None

    def forward(self, x: Tensor) -> Tensor:
        for i, dilated in enumerate(self.dilated):
            y = dilated(functional.leaky_relu(x, _SLOPE))
            if self.plain is not None:
                y = self.plain[i](functional.leaky_relu(y, _SLOPE))
            x = x + y
        return x


class _SubDiscriminator(nn.Module):
    """Convolutions with leaky ReLUs, whose outputs are the features; the last are the logits."""

    def __init__(self, layers: Sequence[nn.Module], finish: nn.Module) -> None:
        super().__init__()
        self.layers, self.finish = nn.ModuleList(layers), finish

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features, and the logits [n, …] last."""
        features = []
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return [*features, self.finish(x)]


@discriminators.register("hifigan")
class HiFiGANDiscriminator(nn.Module):
    """Clips [n, 1, t] → features and logits of sub-discriminators of periods and scales.

    ``periods``: the clip is folded into rows of this length, seen by convolutions along columns.
    ``scales``: number of rates, each half of the one before; the first has spectral instead of
    weight normalization. Widths are the channels of the first layers.
    """

    modalities = ("audio",)

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        periods: list[PositiveInt] | None = None,
        scales: NonNegativeInt = 3,
        period_width: PositiveInt = 32,
        scale_width: PositiveInt = 128,
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 2, "hifigan")
        require_no_labels(num_classes, "hifigan")
        self.periods = tuple([2, 3, 5, 7, 11] if periods is None else periods)
        channels, length = sample_shape
        if not self.periods and not scales:
            rule, hint = "leaves the network no part", "Name periods, or use scales"
            raise ConfigError("model.discriminator.periods", rule, value=[], hint=hint)
        for period in self.periods:
            if -length % period >= length:  # more than a reflection holds
                rule = f"must be below twice the length of the clips, {length:,} samples"
                raise ConfigError("model.discriminator.periods", rule, value=period)
        if scales and scale_width % _GROUPS:
            rule = f"must be a multiple of {_GROUPS}, the groups of the convolutions"
            raise ConfigError("model.discriminator.scale_width", rule, value=scale_width)
        self.by_period = nn.ModuleList(_of_period(channels, period_width) for _ in self.periods)
        self.by_scale = nn.ModuleList(
            _of_scale(channels, scale_width, weight_norm)
            if scale
            else add_spectral_norm(_of_scale(channels, scale_width, lambda layer: layer))
            for scale in range(scales)
        )

    def forward(self, clips: Tensor, labels: Tensor | None = None) -> list[list[Tensor]]:
        """Return, for each part, the features, with the logits last."""
        found = [
            part(_fold(clips, period))
            for period, part in zip(self.periods, self.by_period, strict=True)
        ]
        for scale, part in enumerate(self.by_scale):
            if scale:
                clips = functional.avg_pool1d(clips, 4, 2, padding=2)
            found.append(part(clips))
        return found


def _of_period(channels: int, w: int) -> _SubDiscriminator:
    widths = [channels, w, 4 * w, 16 * w, 32 * w, 32 * w]
    layers = [
        weight_norm(Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
        for (before, after), stride in zip(pairwise(widths), (3, 3, 3, 3, 1), strict=True)
    ]
    return _SubDiscriminator(layers, weight_norm(Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))))


def _of_scale(channels: int, w: int, normalized: Callable[..., nn.Module]) -> _SubDiscriminator:
    shapes = [  # inputs, outputs, taps, stride, groups
        (channels, w, 15, 1, 1),
        (w, w, 41, 2, 4),
        (w, 2 * w, 41, 2, _GROUPS),
        (2 * w, 4 * w, 41, 4, _GROUPS),
        (4 * w, 8 * w, 41, 4, _GROUPS),
        (8 * w, 8 * w, 41, 1, _GROUPS),
        (8 * w, 8 * w, 5, 1, 1),
    ]
    layers = [
        normalized(Conv1d(before, after, taps, stride, padding=taps // 2, groups=groups))
        for before, after, taps, stride, groups in shapes
    ]
    return _SubDiscriminator(layers, normalized(Conv1d(8 * w, 1, 3, padding=1)))


def _fold(clips: Tensor, period: int) -> Tensor:
    """Return [n, c, ⌈t / p⌉, p]: samples p apart are neighbours; reflected at the end."""
    missing = -clips.shape[2] % period
    if missing:
        clips = torch.cat([clips, clips[:, :, -missing - 1 : -1].flip(2)], 2)
    return clips.unflatten(2, (-1, period))


def _normal(layer: nn.Module) -> nn.Module:
    """Draw the weights from N(0, 0.01²), and normalize them (weight normalization)."""
    nn.init.normal_(layer.weight, std=_STD)  # type: ignore[arg-type]
    return weight_norm(layer)
