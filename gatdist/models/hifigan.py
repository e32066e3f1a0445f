"""HiFi-GAN (Kong et al. 2020): a generator from log-mel spectrograms, and its discriminators.

Legend: n clips, b bands, f frames, t samples in time, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gatdist.nn import Conv1d, Conv2d, ConvTranspose1d

_SLOPE = 0.1
_LAST_SLOPE = 0.01  # before the last convolution, as in the published code
_STD = 0.01  # of initial weights


class Version(NamedTuple):
    """Hyperparameters of a published generator.

    Attributes:
        upsampling: Strides of the transposed convolutions; their product is the hop.
        taps: Of the transposed convolutions.
        width: Channels before the first of them; each halves the channels.
        kernels: Of the residual blocks behind each of them, whose outputs are averaged.
        dilations: Of each block's convolutions.
        convolves_twice: Whether a second, undilated convolution follows each of these.
    """

    upsampling: tuple[int, ...]
    taps: tuple[int, ...]
    width: int
    kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    convolves_twice: bool


_V1 = Version((8, 8, 2, 2), (16, 16, 4, 4), 512, (3, 7, 11), ((1, 3, 5),) * 3, True)
VERSIONS = {
    "v1": _V1,
    "v2": _V1._replace(width=128),
    "v3": Version((8, 8, 4), (16, 16, 8), 256, (3, 5, 7), ((1, 2), (2, 6), (3, 12)), False),
}


class HiFiGANGenerator(nn.Module):
    """Log-mel spectrograms [n, b, f] → clips [n, 1, f · hop] in [−1, 1].

    Args:
        bands: b.
        version: Name of :data:`VERSIONS`.
        hop: Samples per frame; other than 256, strides of 4 and 2 replace the published ones.
        width: Channels; None: the published number.
    """

    def __init__(
        self, *, bands: int, version: str = "v1", hop: int = 256, width: int | None = None
    ) -> None:
        super().__init__()
        found = VERSIONS[version]
        widths = [(width or found.width) // 2**level for level in range(len(found.upsampling) + 1)]
        assert math.prod(found.upsampling) == hop
        self.begin = weight_norm(Conv1d(bands, widths[0], 7, padding=3))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for level, (stride, taps) in enumerate(zip(found.upsampling, found.taps, strict=True)):
            before, after = widths[level : level + 2]
            up = ConvTranspose1d(before, after, taps, stride, padding=(taps - stride) // 2)
            self.ups.append(_normal(up))
            self.blocks.append(
                nn.ModuleList(
                    _Block(after, kernel, dilations, found.convolves_twice)
                    for kernel, dilations in zip(found.kernels, found.dilations, strict=True)
                )
            )
        self.finish = _normal(Conv1d(widths[-1], 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
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


class MultiPeriodDiscriminator(nn.Module):
    """Clips [n, 1, t], folded into two dimensions with each of several periods."""

    def __init__(self, *, periods: Sequence[int] = (2, 3, 5, 7, 11), width: int = 32) -> None:
        super().__init__()
        self.periods = tuple(periods)
        widths = [1, width, 4 * width, 16 * width, 32 * width, 32 * width]
        self.parts = nn.ModuleList()
        for _ in self.periods:
            layers = [
                weight_norm(Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
                for before, after, stride in zip(widths, widths[1:], (3, 3, 3, 3, 1), strict=False)
            ]
            finish = weight_norm(Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))
            self.parts.append(_SubDiscriminator(layers, finish))

    def forward(self, clips: Tensor) -> list[list[Tensor]]:
        return [part(_fold(clips, p)) for p, part in zip(self.periods, self.parts, strict=True)]


class MultiScaleDiscriminator(nn.Module):
    """Clips [n, 1, t] at several rates, each half of the one before."""

    def __init__(self, *, scales: int = 3, width: int = 128) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            self._part(width, spectral_norm if scale == 0 else weight_norm)
            for scale in range(scales)
        )

    def _part(self, w: int, normalized: Callable[..., nn.Module]) -> _SubDiscriminator:
        shapes = [  # inputs, outputs, taps, stride, groups
            (1, w, 15, 1, 1),
            (w, w, 41, 2, 4),
            (w, 2 * w, 41, 2, 16),
            (2 * w, 4 * w, 41, 4, 16),
            (4 * w, 8 * w, 41, 4, 16),
            (8 * w, 8 * w, 41, 1, 16),
            (8 * w, 8 * w, 5, 1, 1),
        ]
        layers = [
            normalized(Conv1d(before, after, taps, stride, padding=taps // 2, groups=groups))
            for before, after, taps, stride, groups in shapes
        ]
        return _SubDiscriminator(layers, normalized(Conv1d(8 * w, 1, 3, padding=1)))

    def forward(self, clips: Tensor) -> list[list[Tensor]]:
        found = []
        for scale, part in enumerate(self.parts):
            if scale:
                clips = functional.avg_pool1d(clips, 4, 2, padding=2)
            found.append(part(clips))
        return found


def _fold(clips: Tensor, period: int) -> Tensor:
    """Return [n, 1, ⌈t / p⌉, p]: samples p apart are neighbours; reflected at the end."""
    missing = -clips.shape[2] % period
    if missing:
        clips = functional.pad(clips, (0, missing), "reflect")
    return clips.unflatten(2, (-1, period))


def _normal(layer: nn.Module) -> nn.Module:
    """Draw the weights from N(0, 0.01²), and normalize them (weight normalization)."""
    nn.init.normal_(layer.weight, std=_STD)  # type: ignore[arg-type]
    return weight_norm(layer)
