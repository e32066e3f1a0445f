"""Vocos (Siuzdak 2023): a vocoder whose layers work at the rate of frames, with an inverse STFT.

Legend: n clips, b bands, f frames, c channels, w samples of a window.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.layers import without_autocast
from gatdist.models.registry import generators, require_input, require_no_labels
from gatdist.nn import Conv1d

_TAPS = 7
_STD = 0.02  # of initial weights
_LARGEST = 100.0  # magnitude


@generators.register("vocos")
class Vocos(nn.Module):
    """Log-mel spectrograms [n, b, f] → clips [n, 1, f · hop].

    ConvNeXt blocks (Liu et al. 2022) predict the magnitude and phase of each frame's spectrum.
    ``width``: channels between blocks; ``hidden``: within them. ``window``: samples of a window,
    two or more hops; None: four hops.
    """

    modalities = ("audio",)
    hann: Tensor

    def __init__(
        self,
        *,
        input_shapes: tuple[tuple[int, ...], ...],
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: PositiveInt = 512,
        hidden: PositiveInt = 1536,
        blocks: PositiveInt = 8,
        window: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        require_no_labels(num_classes, "vocos")
        bands, frames = require_input(input_shapes, 2, "spectrogram [bands, frames]", "vocos")
        self.hop = sample_shape[1] // frames
        self.window = window or 4 * self.hop
        hops, rest = divmod(self.window, self.hop)
        if hops < 2 or rest or (self.window - self.hop) % 2:  # windows begin with a 0
            rule = f"must be two or more hops of {self.hop}, and even or odd like the hop"
            raise ConfigError("model.generator.window", rule, value=window)
        self.begin = Conv1d(bands, width, _TAPS, padding=_TAPS // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(_Block(width, hidden, 1 / blocks) for _ in range(blocks))
        self.last_norm = nn.LayerNorm(width, eps=1e-6)
        self.finish = nn.Linear(width, self.window + 2)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)
        for layer in self.modules():
            if isinstance(layer, Conv1d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=_STD)
                nn.init.zeros_(cast("Tensor", layer.bias))

    def forward(self, mel: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.norm(self.begin(mel).mT)  # [n, f, c]
        for block in self.blocks:
            x = block(x)
        x = self.finish(self.last_norm(x))
        with without_autocast(x.device.type):
            magnitude, phase = x.to(self.hann.dtype).chunk(2, dim=-1)
            spectra = torch.polar(magnitude.exp().clamp_max(_LARGEST), phase)
            frames = torch.fft.irfft(spectra, self.window) * self.hann
            weights = self.hann.square().expand(1, frames.shape[1], -1)
            return (self._overlapped(frames) / self._overlapped(weights))[:, None]

    def _overlapped(self, frames: Tensor) -> Tensor:
        """Add frames [n, f, w] that begin one hop after another, and cut the ends: [n, f · hop]."""
        count = self.window // self.hop
        rows = [  # the parts of all frames that are hop samples long
            functional.pad(part, (0, 0, i, count - 1 - i))
            for i, part in enumerate(frames.unflatten(2, (count, self.hop)).unbind(2))
        ]
        total = torch.stack(rows).sum(0).flatten(1)
        cut = (self.window - self.hop) // 2
        return total[:, cut : total.shape[1] - cut]


class _Block(nn.Module):
    """A ConvNeXt block: [n, f, c] → [n, f, c]."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.along = Conv1d(width, width, _TAPS, padding=_TAPS // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.along(x.mT).mT)
        return x + self.scale * self.narrow(functional.gelu(self.widen(y)))
