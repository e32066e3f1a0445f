"""Multilayer perceptrons for points, as in the toy problems of Metz et al. 2017."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from gatdist.models.layers import to_logits
from gatdist.models.registry import discriminators, generators, require_rank

Activation = Literal["leaky_relu", "relu", "tanh"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


def _perceptron(
    inputs: int, outputs: int, width: int, depth: int, activation: Activation
) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _with_labels(inputs: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    if not num_classes:
        return inputs
    assert labels is not None
    one_hot = torch.eye(num_classes, dtype=inputs.dtype, device=inputs.device)[labels]
    return torch.cat([inputs, one_hot], dim=1)


@generators.register("mlp")
class PointGenerator(nn.Module):
    """Multilayer perceptron, latents [n, latent_size] → points [n, d]; labels as one-hot inputs.

    ``depth`` hidden layers of ``width`` units. Use ``tanh`` for modes far apart: it can be flat on
    each mode and steep in between.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 128,
        depth: int = 3,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 1, "mlp")
        self.num_classes = num_classes
        inputs = latent_size + num_classes
        self.layers = _perceptron(inputs, sample_shape[0], width, depth, activation)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(_with_labels(latents, labels, self.num_classes))


@discriminators.register("mlp")
class PointDiscriminator(nn.Module):
    """Multilayer perceptron, points [n, d] → logits [n]; options as for the generator."""

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: int = 128,
        depth: int = 3,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 1, "mlp")
        self.num_classes = num_classes
        self.layers = _perceptron(sample_shape[0] + num_classes, 1, width, depth, activation)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        *hidden, finish = self.layers
        features = _with_labels(samples, labels, self.num_classes)
        for layer in hidden:
            features = layer(features)
        return to_logits(features, None, finish, None)
