"""A recurrent generator of texts that draws one character after the other.

Gated recurrent units (Cho et al. 2014) whose every step sees the character drawn before. Characters
are drawn by Gumbel's trick with the gradient passed straight through (Jang et al. 2017; Kusner &
Hernández-Lobato 2016), so that the discriminator sees texts and the generator gets gradients.

Legend: n texts, V characters, t places, c units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gatdist.models.conditioning import embed_labels
from gatdist.models.noise import gumbel
from gatdist.models.registry import generators, require_rank
from gatdist.models.text.convolutional import one_hot


class RecurrentTextGenerator(nn.Module):
    """Latents [n, latent_size] → texts [n, V, t].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (V, t).
        num_classes: 0 for none.
        width: c.
        temperature: of the softmax whose gradient is passed through (> 0).

    Attributes:
        noise_size: standard normal numbers that :meth:`forward` takes of each sample, V a place.
    """

    modalities = ("text", "tokens")

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.num_characters, self.length = sample_shape
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        self.start = nn.Linear(latent_size, width)
        # Its input is the character before and the latent, which the state would forget.
        self.cell = nn.GRUCell(self.num_characters + latent_size, width)
        self.finish = nn.Linear(width, self.num_characters)
        for layer in (self.start, self.finish):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        self.temperature = temperature
        self.noise_size = self.num_characters * self.length

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Texts [n, V, t].

        Args:
            latents: [n, latent_size].
            labels: int64 [n] if conditional.
            noise: standard normal [n, noise_size]; None takes the likeliest characters.
        """
        latents = embed_labels(latents, labels, self.embedding)
        state = torch.tanh(self.start(latents))
        drawn = latents.new_zeros(latents.shape[0], self.num_characters)
        places = []
        chances = None if noise is None else gumbel(noise).unflatten(1, (self.length, -1))
        for place in range(self.length):
            state = self.cell(torch.cat([drawn, latents], dim=1), state)
            scores = self.finish(state)
            if chances is not None:
                scores = scores + chances[:, place]
            drawn = one_hot(scores, self.temperature)
            places.append(drawn)
        return torch.stack(places, dim=2)


@generators.register("text_recurrent")
def recurrent_text_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    width: int = 512,
    temperature: float = 1.0,
) -> nn.Module:
    """Gated recurrent units, ``width`` of them.

    ``temperature`` (> 0) of the softmax whose gradient is passed straight through: a low one gives
    gradients that fit the characters drawn better, and differ more.
    """
    require_rank(sample_shape, 2, "text_recurrent")
    return RecurrentTextGenerator(latent_size, sample_shape, num_classes, width, temperature)
