"""One-dimensional residual networks for texts (Gulrajani et al. 2017, section 4.4).

The generator's softmax is a continuous relaxation of a text: the discriminator sees probabilities.
No layer couples the samples of a batch.

Legend: n texts, V characters, t places, c channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.conditioning import embed_labels, to_logits
from gatdist.models.noise import gumbel
from gatdist.models.registry import discriminators, generators, require_rank

_TAPS = 5
_RESIDUAL_SCALE = 0.3  # the paper's


def _convolution(inputs: int, outputs: int, taps: int, gain: float) -> nn.Conv1d:
    """A convolution that keeps the length, with variance-preserving weights times ``gain``."""
    layer = nn.Conv1d(inputs, outputs, taps, padding=taps // 2)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs * taps))
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


class _Block(nn.Module):
    """x + 0.3 · conv(relu(conv(relu(x)))), [n, c, t]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, _TAPS, math.sqrt(2))
        self.second = _convolution(width, width, _TAPS, math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        change = self.second(functional.relu(self.first(functional.relu(x))))
        return x + _RESIDUAL_SCALE * change


class ConvolutionalTextGenerator(nn.Module):
    """Latents [n, latent_size] → probabilities of characters [n, V, t].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (V, t).
        num_classes: 0 for none.
        width: c.
        blocks: residual blocks.
        temperature: above 0, characters are drawn from the probabilities, by Gumbel's trick at this
            temperature with the gradient passed straight through (Jang et al. 2017); 0 gives the
            probabilities themselves.

    Attributes:
        noise_size: standard normal numbers that :meth:`forward` takes of each sample.
    """

    modalities = ("text", "tokens")

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        blocks: int,
        temperature: float,
    ) -> None:
        super().__init__()
        num_characters, length = sample_shape
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.start_shape = (width, length)
        self.start = nn.Linear(latent_size, width * length)
        nn.init.normal_(self.start.weight, std=1 / math.sqrt(latent_size))
        nn.init.zeros_(self.start.bias)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.finish = _convolution(width, num_characters, 1, 1.0)
        self.temperature = temperature
        self.noise_size = num_characters * length if temperature else 0

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Texts [n, V, t].

        Args:
            latents: [n, latent_size].
            labels: int64 [n] if conditional.
            noise: standard normal [n, noise_size]; None takes the likeliest characters.
        """
        x = self.start(embed_labels(latents, labels, self.embedding)).view(-1, *self.start_shape)
        scores: Tensor = self.finish(self.blocks(x))
        if not self.temperature:
            return scores.softmax(dim=1)
        if noise is not None:
            scores = scores + gumbel(noise).view_as(scores)
        return one_hot(scores, self.temperature)


class ConvolutionalTextDiscriminator(nn.Module):
    """Texts [n, V, t] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (V, t).
        num_classes: 0 for none.
        width: c.
        blocks: residual blocks.
    """

    modalities = ("text", "tokens")

    def __init__(
        self, sample_shape: tuple[int, ...], num_classes: int, width: int, blocks: int
    ) -> None:
        super().__init__()
        num_characters, length = sample_shape
        # One of V inputs is 1: each output is one weight.
        self.start = _convolution(num_characters, width, 1, math.sqrt(num_characters))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        features = width * length
        self.finish = nn.Linear(features, 1)
        nn.init.normal_(self.finish.weight, std=1 / math.sqrt(features))
        nn.init.zeros_(self.finish.bias)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Texts [n, V, t], labels int64 [n] if conditional → logits [n]."""
        features = self.blocks(self.start(samples)).flatten(1)
        return to_logits(features, labels, self.finish, self.embedding)


def one_hot(scores: Tensor, temperature: float) -> Tensor:
    """The highest of scores [n, V, …] as 1, others 0, with the gradient of softmax(scores/τ)."""
    soft = (scores / temperature).softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard + soft - soft.detach()


@generators.register("text_convolutional")
def convolutional_text_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 512,
    blocks: int = 5,
    temperature: float = 0.0,
) -> nn.Module:
    """``blocks`` residual blocks of ``width`` channels; the defaults are the paper's.

    ``temperature``: 0 shows the discriminator probabilities; above 0, characters drawn from them.
    """
    require_rank(sample_shape, 2, "text_convolutional")
    return ConvolutionalTextGenerator(
        latent_size, sample_shape, num_classes, width, blocks, temperature
    )


@discriminators.register("text_convolutional")
def convolutional_text_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 512,
    blocks: int = 5,
) -> nn.Module:
    """``blocks`` residual blocks of ``width`` channels; the defaults are the paper's."""
    require_rank(sample_shape, 2, "text_convolutional")
    return ConvolutionalTextDiscriminator(sample_shape, num_classes, width, blocks)
