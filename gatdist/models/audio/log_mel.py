"""Sounds by their log-mel spectrograms.

Legend: n sounds, c channels, t places in time, b bands, f frames.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.models.conditioning import without_autocast
from gatdist.models.image.residual import ResidualDiscriminator
from gatdist.models.registry import discriminators, require_rank

# What is added to powers before their logarithm is taken: −60 dB of a full-scale tone, about.
_FLOOR = 1e-4


class LogMel(nn.Module):
    """Sounds [n, c, t] → the logarithm of their power in mel bands, [n, c, b, f].

    Windows of Hann, powers of a Fourier transform, triangular bands that are equally wide on the
    mel scale of O'Shaughnessy (1987), 2595 log₁₀(1 + Hz/700); natural logarithms, shifted and
    scaled so that silence is −1 and a full-scale tone about 1.

    Args:
        sample_rate: in hertz.
        num_bands: b.
        window: places in a window, a power of two.
        hop: places from one window to the next.
    """

    hann: Tensor
    bands: Tensor

    def __init__(self, sample_rate: int, num_bands: int, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        bands = mel_bands(sample_rate, num_bands, window)
        self.register_buffer("bands", bands, persistent=False)

    @classmethod
    def for_rate(cls, sample_rate: int) -> Self:
        """Windows of about 32 ms, a quarter of one apart, and as many bands as they can tell."""
        window = 2 ** max(5, round(math.log2(0.032 * sample_rate)))
        return cls(sample_rate, 64 if sample_rate >= 8000 else 16, window, window // 4)

    def num_frames(self, length: int) -> int:
        """f, for sounds of ``length`` places."""
        return 1 + length // self.hop

    def forward(self, clips: Tensor) -> Tensor:
        """See the class. Twice differentiable."""
        n, c, t = clips.shape
        spectrum = torch.stft(
            clips.reshape(n * c, t),
            self.window,
            self.hop,
            window=self.hann,
            pad_mode="reflect" if t > self.window // 2 else "constant",
            return_complex=True,
        )
        real, imaginary = torch.view_as_real(spectrum).unbind(-1)
        # Of a full-scale tone this is about 1 in its band.
        power = (real.square() + imaginary.square()) * (2 / self.hann.sum()) ** 2
        in_bands = (self.bands @ power + _FLOOR).log()  # [n·c, b, f]
        scaled = in_bands * (-2 / math.log(_FLOOR)) + 1
        return scaled.unflatten(0, (n, c))


def mel_bands(sample_rate: int, num_bands: int, window: int) -> Tensor:
    """Triangular bands on the mel scale, [num_bands, window/2 + 1]; the peak of each is 1.

    Raises:
        ConfigError: a band holds no frequency of the Fourier transform.
    """
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, highest, num_bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    lower, peak, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - lower) / (peak - lower), (upper - frequencies) / (upper - peak)
    bands = torch.minimum(rising, falling).clamp_min(0)
    if not bands.is_meta and not bands.sum(dim=1).all():
        raise ConfigError(
            "model.discriminator.num_bands",
            f"windows of {window} places have no frequency in some of the bands",
            value=num_bands,
            hint="Use fewer bands, or a longer window",
        )
    return bands.float()


class LogMelDiscriminator(nn.Module):
    """Sounds [n, C, t] → logits [n], by a residual network on their log-mel spectrograms.

    Args:
        sample_shape: (C, t).
        num_classes: 0 for none.
        front: makes the spectrograms.
        num_bands: of them.
        width: channels at the finest, doubling up to
        max_width: channels.
        blocks: residual blocks a resolution.
    """

    modalities = ("audio",)

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        front: LogMel,
        num_bands: int,
        width: int,
        max_width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.front = front
        seen = (sample_shape[0], num_bands, front.num_frames(sample_shape[1]))
        self.body = ResidualDiscriminator(seen, num_classes, width, max_width, blocks)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Sounds [n, C, t], labels int64 [n] if conditional → logits [n]."""
        with without_autocast(samples.device.type):  # Fourier transforms know no half precision
            seen = self.front(samples)
        return self.body(seen, labels)


@discriminators.register("log_mel")
def log_mel_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    sample_rate: int,
    num_bands: int = 64,
    window: int = 512,
    hop: int = 128,
    width: int = 32,
    max_width: int = 256,
    blocks: int = 1,
) -> nn.Module:
    """A residual network on spectrograms of ``num_bands`` bands, windows ``hop`` places apart.

    Raises:
        ConfigError: no sounds, or too many bands for the window.
    """
    require_rank(sample_shape, 2, "log_mel")
    front = LogMel(sample_rate, num_bands, window, hop)
    return LogMelDiscriminator(
        sample_shape, num_classes, front, num_bands, width, max_width, blocks
    )
