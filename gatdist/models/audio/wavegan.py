"""WaveGAN (Donahue et al. 2019, appendix D): strided convolutions of 25 taps on the waveform.

The discriminator shuffles phases: each sample's feature maps are shifted by a few places, layer by
layer, so that it can't tell fakes by the phase of what transposed convolutions leave in them. The
shifts are drawn by the sample's position in the run. No layer couples the samples of a batch.

Legend: n sounds, c channels, t places in time.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.conditioning import embed_labels, to_logits
from gatdist.models.noise import uniform
from gatdist.models.registry import discriminators, generators, require_rank

_SHORTEST = 16  # of the feature maps
_STRIDE = 4
_TAPS = 25
_SLOPE = 0.2
_RELU_GAIN = math.sqrt(2)
_LEAKY_GAIN = math.sqrt(2 / (1 + _SLOPE**2))


def _start(layer: nn.Module, fan_in: float, gain: float) -> nn.Module:
    """The layer with variance-preserving weights; ``fan_in`` inputs enter each output."""
    nn.init.normal_(layer.get_parameter("weight"), std=gain / math.sqrt(fan_in))
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class WaveGANGenerator(nn.Module):
    """Latents [n, latent_size] → sounds [n, C, t] in [−1, 1].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (C, t).
        num_classes: 0 for none.
        widths: channels from the shortest feature maps to the longest before the sound.
    """

    modalities = ("audio",)

    def __init__(
        self, latent_size: int, sample_shape: tuple[int, ...], num_classes: int, widths: list[int]
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.start_shape = (widths[0], _SHORTEST)
        self.start = _start(nn.Linear(latent_size, math.prod(self.start_shape)), latent_size, 1.0)
        # Each output of a strided transposed convolution sees only every fourth tap.
        self.layers = nn.ModuleList(
            _start(
                nn.ConvTranspose1d(before, after, _TAPS, _STRIDE, 11, 1),
                before * _TAPS / _STRIDE,
                _RELU_GAIN,
            )
            for before, after in pairwise([*widths, sample_shape[0]])
        )

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [n, latent_size], labels int64 [n] if conditional → sounds [n, C, t]."""
        x = self.start(embed_labels(latents, labels, self.embedding)).view(-1, *self.start_shape)
        for layer in self.layers:
            x = layer(functional.relu(x))
        return torch.tanh(x)


class WaveGANDiscriminator(nn.Module):
    """Sounds [n, C, t] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (C, t).
        num_classes: 0 for none.
        widths: channels behind each layer.
        phase_shuffle: the most places that a feature map is shifted by.

    Attributes:
        noise_size: standard normal numbers that :meth:`forward` takes of each sample, one a shift.
    """

    modalities = ("audio",)

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        phase_shuffle: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _start(
                nn.Conv1d(before, after, _TAPS, _STRIDE, 11),
                before * _TAPS,
                _LEAKY_GAIN if level else 1.0,
            )
            for level, (before, after) in enumerate(pairwise([sample_shape[0], *widths]))
        )
        features = widths[-1] * _SHORTEST
        self.finish = _start(nn.Linear(features, 1), features, _LEAKY_GAIN)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None
        self.phase_shuffle = phase_shuffle
        self.noise_size = len(widths) - 1 if phase_shuffle else 0

    def forward(
        self, samples: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Logits [n].

        Args:
            samples: sounds [n, C, t].
            labels: int64 [n] if conditional.
            noise: standard normal [n, noise_size]; None shifts nothing.
        """
        x = samples
        for level, layer in enumerate(self.layers):
            x = functional.leaky_relu(layer(x), _SLOPE)
            if noise is not None and level < self.noise_size:
                x = shift(x, self._places(noise[:, level]))
        return to_logits(x.flatten(1), labels, self.finish, self.embedding)

    def _places(self, noise: Tensor) -> Tensor:
        """Whole numbers from −phase_shuffle to phase_shuffle, equally often; both [n]."""
        count = 2 * self.phase_shuffle + 1
        return (uniform(noise) * count).long().clamp(max=count - 1) - self.phase_shuffle


def shift(x: Tensor, places: Tensor) -> Tensor:
    """Move x [n, c, t] by ``places`` (int64 [n], less than t) in time, reflected at its ends."""
    last = x.shape[2] - 1
    sources = (torch.arange(last + 1, device=x.device) - places[:, None]).abs()  # [n, t]
    sources = last - (last - sources).abs()
    return x.gather(2, sources[:, None].expand(-1, x.shape[1], -1))


def _widths(sample_shape: tuple[int, ...], width: int) -> list[int]:
    """Channels from the longest feature maps to the shortest, doubling.

    Raises:
        ConfigError: no sounds, or of another length.
    """
    require_rank(sample_shape, 2, "wavegan")
    length = sample_shape[1]
    times = max(1, round(math.log(length / _SHORTEST, _STRIDE)))
    if length != _SHORTEST * _STRIDE**times:
        raise ConfigError(
            "data.length",
            "'wavegan' does sounds of 64, 256, 1024, 4096, 16384, 65536 … samples",
            value=length,
            hint=f"Set it to {_SHORTEST * _STRIDE**times}",
        )
    return [width * 2**level for level in range(times)]


@generators.register("wavegan")
def wavegan_generator(
    *, latent_size: int, sample_shape: tuple[int, ...], num_classes: int, width: int = 64
) -> nn.Module:
    """``width`` channels next to the sound, doubling each time that it gets four times shorter.

    The default is the paper's for 16,384 samples, with ``latent_size = 100``.
    """
    widths = _widths(sample_shape, width)[::-1]
    return WaveGANGenerator(latent_size, sample_shape, num_classes, widths)


@discriminators.register("wavegan")
def wavegan_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 64,
    phase_shuffle: int = 2,
) -> nn.Module:
    """``width`` channels next to the sound, doubling each time that it gets four times shorter."""
    widths = _widths(sample_shape, width)
    if phase_shuffle < 0 or phase_shuffle >= _SHORTEST * _STRIDE:
        raise ConfigError(
            "model.discriminator.phase_shuffle", "must be 0 to 63", value=phase_shuffle
        )
    return WaveGANDiscriminator(sample_shape, num_classes, widths, phase_shuffle)
