"""Penalties per sample, and their schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gatdist.common.registry import Registry
from gatdist.config import PlayerName, Schedule

Observations = dict[str, Tensor]
Averages = Mapping[str, Tensor]
Side = Literal["real", "fake", "between", "logits", "latents"]


@dataclass(frozen=True)
class Penalty:
    """A penalty and what it is a function of.

    Attributes:
        at: What it differentiates by: the ``real`` samples, the ``fake`` ones, points ``between``
            both, or the generator's ``latents``. At ``logits`` it differentiates nothing.
        per_sample: (inputs [n, ...] with gradients, their scalars [n], averages) → penalty [n].
            Scalars are logits, or at ``latents`` the projections ⟨G(z), y⟩ / √pixels. At ``logits``
            it takes (real logits [n], fake logits [n], averages).
        averages: Decay per step of the running means that it reads, by tag of the observation.
        observe: (inputs, scalars) → observations [n] by tag, for ``averages``.
    """

    at: Side
    per_sample: Callable[[Tensor, Tensor, Averages], Tensor]
    averages: Mapping[str, float] = field(default_factory=dict)
    observe: Callable[[Tensor, Tensor], Observations] = lambda inputs, scalars: {}

    @property
    def player(self) -> PlayerName:
        """The player to whose loss it is added."""
        return "generator" if self.at == "latents" else "discriminator"

    @property
    def differentiates(self) -> bool:
        """Whether its gradient needs second derivatives of a network."""
        return self.at != "logits"


@dataclass(frozen=True)
class ScheduledPenalty:
    """A penalty evaluated every ``every_steps`` steps, with its strength multiplied by as many.

    Its mean over steps is that of the plain penalty ("lazy regularization", Karras et al. 2020).
    """

    name: str
    penalty: Penalty
    strength: Schedule
    every_steps: int = 1

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def __call__(
        self, inputs: Tensor, scalars: Tensor, averages: Averages, strength: float | Tensor
    ) -> Tensor:
        """Return the term of its player's loss, [n]; ``strength`` is γ."""
        value = self.penalty.per_sample(inputs, scalars, averages)
        return strength * self.every_steps * value


penalties: Registry[Penalty] = Registry("game.penalties")


def input_gradient(inputs: Tensor, scalars: Tensor) -> Tensor:
    """∂scalars_i/∂inputs_i for each sample, [n, numbers in a sample]; differentiable.

    One ``grad`` of the sum serves all samples, because no layer couples them. Parameters' ``.grad``
    stay unchanged, so the data-parallel reduction sees only the backward of the loss.
    """
    (gradient,) = torch.autograd.grad(scalars.sum(), inputs, create_graph=True)
    return gradient.flatten(1)


def half_squared_gradient(inputs: Tensor, scalars: Tensor, averages: Averages) -> Tensor:
    """½ ‖∇ₓ D(x)‖² for each sample, [n]."""
    return 0.5 * input_gradient(inputs, scalars).square().sum(1)


def _norm(gradient: Tensor) -> Tensor:
    """2-norm of each row, [n]; its derivative at 0 is 0, not NaN."""
    squared = gradient.square().sum(1)
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def unit_gradient(inputs: Tensor, scalars: Tensor, averages: Averages) -> Tensor:
    """(‖∇ₓ D(x)‖ − 1)² for each sample, [n]."""
    return (_norm(input_gradient(inputs, scalars)) - 1).square()


def lecam(real: Tensor, fake: Tensor, averages: Averages) -> Tensor:
    """(r − ā_fake)² + (ℓ − ā_real)² for each pair, [n]."""
    to_fake, to_real = averages["logits/fake"], averages["logits/real"]
    return (real - to_fake).square() + (fake - to_real).square()


def path_length(latents: Tensor, projections: Tensor, averages: Averages) -> Tensor:
    """(‖∂⟨G(w), y⟩/∂w‖ / √(layers · pixels) − ā)² for each sample, [n]."""
    lengths = _norm(input_gradient(latents, projections)) / math.sqrt(_num_layers(latents))
    return (lengths - averages["path_length"]).square()


def _path_lengths(latents: Tensor, projections: Tensor) -> Observations:
    (gradient,) = torch.autograd.grad(projections.sum(), latents, retain_graph=True)
    lengths = gradient.flatten(1).norm(dim=1) / math.sqrt(_num_layers(latents))
    return {"path_length": lengths}


def _num_layers(latents: Tensor) -> int:
    """Return the number of styles in a sample of [n, layers, s]; 1 for latents [n, s]."""
    return math.prod(latents.shape[1:-1])


def projections(samples: Tensor, noise: Tensor) -> Tensor:
    """⟨sample_i, noise_i⟩ / √pixels, [n], of tensors [n, C, ...]; C does not count as pixels."""
    pixels = math.prod(samples.shape[2:]) or 1
    return (samples * noise).flatten(1).sum(1) / math.sqrt(pixels)


_PENALTIES = {
    # Mescheder et al. 2018.
    "r1": Penalty("real", half_squared_gradient),
    "r2": Penalty("fake", half_squared_gradient),
    # Gulrajani et al. 2017: at ε x + (1 − ε) G(z), ε uniform.
    "wgan_gp": Penalty("between", unit_gradient),
    # Tseng et al. 2021: ā are running means of logits.
    "lecam": Penalty("logits", lecam, averages={"logits/real": 0.99, "logits/fake": 0.99}),
    # Karras et al. 2020: y is normal, ā the mean length in the steps before. w are the outputs
    # [n, layers, s] of the generator's module ``styles``, or its latents [n, s].
    "path_length": Penalty(
        "latents", path_length, averages={"path_length": 0.99}, observe=_path_lengths
    ),
}
for _name, _penalty in _PENALTIES.items():
    penalties.register(_name)(_penalty)
