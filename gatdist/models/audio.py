"""Networks for audio: WaveGAN, and a discriminator of log-mel spectrograms.

Legend: n clips, c channels, t samples in time, b bands, f frames.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.image.residual import ResidualDiscriminator
from gatdist.models.layers import (
    doubling_widths,
    embed_labels,
    glorot,
    label_embedding,
    to_logits,
    uniform,
    without_autocast,
)
from gatdist.models.registry import discriminators, generators, require_rank
from gatdist.nn import Conv1d, ConvTranspose1d, is_plain, leaky_relu

# WaveGAN: samples in the shortest feature maps, and the convolutions' stride and kernel.
_SHORTEST, _STRIDE, _TAPS = 16, 4, 25
_SLOPE = 0.2
# Added to powers before the logarithm: about −60 dB of a full-scale tone.
_FLOOR = 1e-4


@generators.register("wavegan")
class WaveGANGenerator(nn.Module):
    """WaveGAN (Donahue et al. 2019, appendix D): latents → clips [n, C, t] in [−1, 1].

    Transposed convolutions of 25 taps; t is 16 · 4ᵏ, or 32 · 4ᵏ with a last stride of 2. ``width``
    channels at the finest resolution, doubling each time the length is divided by 4; the default is
    the paper's, with ``latent_size = 100`` and ``latent_distribution = "uniform"``. Padding and
    initial weights are those of the paper's code. Labels, which the paper lacks, are embedded into
    the latents.
    """

    modalities = ("audio",)

    def __init__(
        self, *, latent_size: int, sample_shape: tuple[int, ...], num_classes: int, width: int = 64
    ) -> None:
        super().__init__()
        self.strides = _strides(sample_shape)
        widths = doubling_widths(width, len(self.strides))[::-1]
        self.embedding = label_embedding(num_classes, latent_size)
        self.start_shape = (widths[0], _SHORTEST)
        self.start = glorot(nn.Linear(latent_size, math.prod(self.start_shape)))
        self.layers = nn.ModuleList(
            glorot(ConvTranspose1d(before, after, _TAPS, stride, _padding(stride)[0]))
            for stride, (before, after) in zip(
                self.strides, pairwise([*widths, sample_shape[0]]), strict=True
            )
        )

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(embed_labels(latents, labels, self.embedding)).view(-1, *self.start_shape)
        for stride, layer in zip(self.strides, self.layers, strict=True):
            # One sample too many: the padding is larger on the right.
            x = layer(functional.relu(x))[..., : x.shape[2] * stride]
        return torch.tanh(x)


@discriminators.register("wavegan")
class WaveGANDiscriminator(nn.Module):
    """WaveGAN (Donahue et al. 2019, appendix D): clips [n, C, t] → logits [n].

    Strided convolutions of 25 taps; ``width``, padding and initial weights as for the generator.
    ``phase_shuffle``: each feature map is shifted by up to so many samples, drawn per sample and
    layer as in the paper (its code draws per batch), so that the phase of the generator's artifacts
    does not identify fakes. Labels, which the paper lacks, by projection (Miyato & Koyama 2018).
    """

    modalities = ("audio",)

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        phase_shuffle: int = 2,
    ) -> None:
        super().__init__()
        self.strides = _strides(sample_shape)
        widths = doubling_widths(width, len(self.strides))
        shortest = _SHORTEST * self.strides[-1]  # of the maps that are shifted
        if not 0 <= phase_shuffle < shortest:
            key = "model.discriminator.phase_shuffle"
            raise ConfigError(key, f"must be 0 to {shortest - 1}", value=phase_shuffle)
        self.layers = nn.ModuleList(
            glorot(Conv1d(before, after, _TAPS, stride))
            for stride, (before, after) in zip(
                self.strides, pairwise([sample_shape[0], *widths]), strict=True
            )
        )
        features = widths[-1] * _SHORTEST
        self.finish = glorot(nn.Linear(features, 1))
        self.embedding = label_embedding(num_classes, features)
        self.phase_shuffle = phase_shuffle
        self.noise_size = len(widths) - 1 if phase_shuffle else 0

    def forward(
        self, samples: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """``noise`` is [n, noise_size]; None shifts nothing."""
        x = samples
        for level, (stride, layer) in enumerate(zip(self.strides, self.layers, strict=True)):
            x = leaky_relu(layer(functional.pad(x, _padding(stride))), _SLOPE)
            if noise is not None and level < self.noise_size:
                x = shift(x, self._places(noise[:, level]), self.phase_shuffle)
        return to_logits(x.flatten(1), labels, self.finish, self.embedding)

    def _places(self, noise: Tensor) -> Tensor:
        """Map normal numbers [n] to integers in ±phase_shuffle, equally probable."""
        count = 2 * self.phase_shuffle + 1
        return (uniform(noise) * count).long().clamp(max=count - 1) - self.phase_shuffle


def shift(x: Tensor, places: Tensor, most: int) -> Tensor:
    """Shift x [n, c, t] in time by ``places`` (int64 [n], in ±most), reflecting at the ends.

    ``most`` is less than t. Deterministic on GPUs, with derivatives of every order.
    """
    if is_plain(x):
        return _reflected(x, places)
    found: Tensor = _Shift.apply(x, places, most)  # type: ignore[no-untyped-call]
    return found


def _reflected(x: Tensor, places: Tensor) -> Tensor:
    last = x.shape[2] - 1
    sources = (torch.arange(last + 1, device=x.device) - places[:, None]).abs()  # [n, t]
    return _pick(x, last - (last - sources).abs())


# Each is the other's derivative. gather's own adds with atomics on CUDA.
class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.most = most
        return _reflected(x, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _Unshift.apply(gradient, places, ctx.most), None, None  # type: ignore[no-untyped-call]


class _Unshift(torch.autograd.Function):
    """The sum of what each sample became: itself, and its reflection at an end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, most: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.most = most
        end = x.shape[2] + 2 * most
        padded = functional.pad(x, (2 * most, 2 * most))  # what has no counterpart in x is 0
        around = torch.arange(end + 2 * most, device=x.device) + places[:, None]
        out = _pick(padded, around[:, 2 * most : end])
        out[:, :, 1 : most + 1] += _pick(padded, around[:, most : 2 * most].flip(1))
        out[:, :, -most - 1 : -1] += _pick(padded, around[:, end : end + most].flip(1))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return shift(gradient, places, ctx.most), None, None


def _pick(x: Tensor, sources: Tensor) -> Tensor:
    return x.gather(2, sources[:, None].expand(-1, x.shape[1], -1))


def _strides(sample_shape: tuple[int, ...]) -> list[int]:
    """Return the strides, of both networks: 4, and a last 2 for lengths of 32 · 4ᵏ."""
    require_rank(sample_shape, 2, "wavegan")
    length = sample_shape[1]
    doublings = max(2, round(math.log2(length / _SHORTEST)))
    if length != _SHORTEST * 2**doublings:
        raise ConfigError(
            "data.length",
            "'wavegan' takes clips of 64, 128, 256 … 16384, 32768, 65536 … samples",
            value=length,
            hint=f"Set it to {_SHORTEST * 2**doublings}",
        )
    return [_STRIDE] * (doublings // 2) + [2] * (doublings % 2)


def _padding(stride: int) -> tuple[int, int]:
    """Return the zeros left and right of lengths that ``stride`` divides: TensorFlow's "SAME"."""
    total = _TAPS - stride
    return total // 2, total - total // 2


class LogMel(nn.Module):
    """Log-mel spectrogram: clips [n, c, t] → [n, c, b, f]. Twice differentiable.

    Hann windows of ``window`` samples every ``hop``, power spectra, triangular bands of equal width
    on the mel scale of O'Shaughnessy (1987), 2595 log₁₀(1 + Hz/700). Natural logarithms, scaled so
    that silence is −1 and a full-scale tone about 1.
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
        """Return one with windows of about 32 ms, a hop of a quarter, and 64 or 16 bands."""
        window = 2 ** max(5, round(math.log2(0.032 * sample_rate)))
        return cls(sample_rate, 64 if sample_rate >= 8000 else 16, window, window // 4)

    def forward(self, clips: Tensor) -> Tensor:
        n, c, t = clips.shape
        # Not torch.stft, whose derivative adds with atomics on CUDA.
        centered = _extend(clips.reshape(n * c, t), self.window // 2)
        frames = centered.unfold(1, self.window, self.hop) * self.hann  # [n·c, f, window]
        spectrum = torch.fft.rfft(frames).transpose(1, 2)
        real, imaginary = torch.view_as_real(spectrum).unbind(-1)
        # A full-scale tone has a power of about 1 in its band.
        power = (real.square() + imaginary.square()) * (2 / self.hann.sum()) ** 2
        in_bands = (self.bands @ power + _FLOOR).log()  # [n·c, b, f]
        scaled = in_bands * (-2 / math.log(_FLOOR)) + 1
        return scaled.unflatten(0, (n, c))


def _extend(x: Tensor, size: int) -> Tensor:
    """Extend x [n, t] at both ends by reflections, or by zeros if it is too short."""
    if x.shape[1] <= size:
        return functional.pad(x, (size, size))
    return torch.cat([x[:, 1 : size + 1].flip(1), x, x[:, -size - 1 : -1].flip(1)], dim=1)


def mel_bands(sample_rate: int, num_bands: int, window: int) -> Tensor:
    """Return triangular bands on the mel scale, [num_bands, window/2 + 1], each with peak 1."""
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
            f"some bands contain no frequency of a window of {window} samples",
            value=num_bands,
            hint="Use fewer bands, or a longer window",
        )
    return bands.float()


@discriminators.register("log_mel")
class LogMelDiscriminator(nn.Module):
    """The discriminator ``residual`` on log-mel spectrograms: clips [n, C, t] → logits [n].

    ``num_bands`` bands, windows of ``window`` samples every ``hop`` samples; ``width``,
    ``max_width`` and ``blocks`` as for ``residual``.
    """

    modalities = ("audio",)

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 2, "log_mel")
        channels, length = sample_shape
        self.front = LogMel(sample_rate, num_bands, window, hop)
        self.body = ResidualDiscriminator(
            sample_shape=(channels, num_bands, 1 + length // hop),
            num_classes=num_classes,
            width=width,
            max_width=max_width,
            blocks=blocks,
        )

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        with without_autocast(samples.device.type):  # Fourier transforms have no half precision
            spectrograms = self.front(samples)
        return self.body(spectrograms, labels)
