"""Networks for text: one-hot [V, t], V characters at each of t places.

The first character means that the text has ended. Generators return probabilities, or one-hot
values that pass gradients. Legend: n texts, c channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.layers import (
    embed_labels,
    gumbel,
    initialized,
    label_embedding,
    one_hot,
    to_logits,
)
from gatdist.models.registry import discriminators, generators, require_rank
from gatdist.nn import Conv1d

_MODALITIES = ("text", "tokens")
_TAPS = 5
_RESIDUAL_SCALE = 0.3  # the paper's


def _convolution(inputs: int, outputs: int, taps: int, gain: float) -> nn.Conv1d:
    return initialized(Conv1d(inputs, outputs, taps, padding=taps // 2), gain)


class _Block(nn.Module):
    """x + 0.3 · conv(relu(conv(relu(x)))), [n, c, t]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, _TAPS, math.sqrt(2))
        self.second = _convolution(width, width, _TAPS, math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        change = self.second(functional.relu(self.first(functional.relu(x))))
        return x + _RESIDUAL_SCALE * change


@generators.register("text_convolutional")
class ConvolutionalTextGenerator(nn.Module):
    """Residual 1-D convolutions (Gulrajani et al. 2017, section 4.4): latents → texts [n, V, t].

    ``blocks`` residual blocks of ``width`` channels; the defaults are the paper's. With
    ``temperature = 0``, the paper's, texts are probabilities. Above 0 they are characters drawn by
    straight-through Gumbel-softmax at this temperature (Jang et al. 2017).
    """

    modalities = _MODALITIES

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 512,
        blocks: int = 5,
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 2, "text_convolutional")
        num_characters, length = sample_shape
        self.embedding = label_embedding(num_classes, latent_size)
        self.start_shape = (width, length)
        self.start = initialized(nn.Linear(latent_size, width * length))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.finish = _convolution(width, num_characters, 1, 1.0)
        self.temperature = temperature
        self.noise_size = num_characters * length if temperature else 0

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        x = self.start(embed_labels(latents, labels, self.embedding)).view(-1, *self.start_shape)
        scores: Tensor = self.finish(self.blocks(x))
        if not self.temperature:
            return scores.softmax(dim=1)
        if noise is not None:
            scores = scores + gumbel(noise).view_as(scores)
        return one_hot(scores, self.temperature)


@discriminators.register("text_convolutional")
class ConvolutionalTextDiscriminator(nn.Module):
    """Residual 1-D convolutions (Gulrajani et al. 2017, section 4.4): texts [n, V, t] → logits [n].

    ``blocks`` residual blocks of ``width`` channels; the defaults are the paper's.
    """

    modalities = _MODALITIES

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 512,
        blocks: int = 5,
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 2, "text_convolutional")
        num_characters, length = sample_shape
        # One of V inputs is 1: each output is one weight.
        self.start = _convolution(num_characters, width, 1, math.sqrt(num_characters))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        features = width * length
        self.finish = initialized(nn.Linear(features, 1))
        self.embedding = label_embedding(num_classes, features)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        features = self.blocks(self.start(samples)).flatten(1)
        return to_logits(features, labels, self.finish, self.embedding)


@generators.register("text_recurrent")
class RecurrentTextGenerator(nn.Module):
    """Gated recurrent unit (Cho et al. 2014) of ``width`` units: latents → texts [n, V, t].

    Each step gets the latent and the character drawn before, by straight-through Gumbel-softmax
    (Jang et al. 2017; Kusner & Hernández-Lobato 2016). A lower ``temperature`` (> 0) gives
    gradients that are closer to those of the drawn characters, with more variance.
    """

    modalities = _MODALITIES

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 512,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 2, "text_recurrent")
        self.num_characters, self.length = sample_shape
        self.embedding = label_embedding(num_classes, latent_size)
        self.start = nn.Linear(latent_size, width)
        self.cell = nn.GRUCell(self.num_characters + latent_size, width)
        self.finish = nn.Linear(width, self.num_characters)
        for layer in (self.start, self.finish):
            initialized(layer)
        self.temperature = temperature
        self.noise_size = self.num_characters * self.length

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        latents = embed_labels(latents, labels, self.embedding)
        state = torch.tanh(self.start(latents))
        drawn = latents.new_zeros(latents.shape[0], self.num_characters)
        places = []
        # Without noise, take the most probable characters.
        chances = None if noise is None else gumbel(noise).unflatten(1, (self.length, -1))
        for place in range(self.length):
            state = self.cell(torch.cat([drawn, latents], dim=1), state)
            scores = self.finish(state)
            if chances is not None:
                scores = scores + chances[:, place]
            drawn = one_hot(scores, self.temperature)
            places.append(drawn)
        return torch.stack(places, dim=2)
