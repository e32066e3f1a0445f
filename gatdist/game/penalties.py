"""Gradient penalties on the discriminator, per sample.

| name | penalty, times its strength γ |
| --- | --- |
| ``r1`` | ½ ‖∇ₓ D(x)‖² at real samples (Mescheder et al. 2018) |
| ``r2`` | ½ ‖∇ₓ D(x)‖² at fake samples |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gatdist.registry import Registry


@dataclass(frozen=True)
class Penalty:
    """A penalty at the samples of one side.

    Attributes:
        at: whose samples it differentiates at.
        per_sample: (samples [n, ...] that require gradients, their logits [n]) → penalty [n].
    """

    at: Literal["real", "fake"]
    per_sample: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScheduledPenalty:
    """A penalty evaluated every ``every_steps`` steps with its strength multiplied by as many.

    Its average over steps is that of the plain penalty (Karras et al. 2020, "lazy regularization").
    """

    name: str
    penalty: Penalty
    strength: float
    every_steps: int

    def __call__(self, samples: Tensor, logits: Tensor) -> Tensor:
        """The penalty's share of the discriminator's loss, [n]."""
        return self.strength * self.every_steps * self.penalty.per_sample(samples, logits)


penalties: Registry[Penalty] = Registry("game.penalties")


def half_squared_gradient(samples: Tensor, logits: Tensor) -> Tensor:
    """½ ‖∂logits_i/∂samples_i‖² for each sample, [n].

    Differentiable in the discriminator's parameters.

    One ``grad`` of the sum serves all samples, since no layer couples them. It does not touch
    parameters' ``.grad``, so the data-parallel reduction sees only the plain backward that follows.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1)


penalties.register("r1")(Penalty("real", half_squared_gradient))
penalties.register("r2")(Penalty("fake", half_squared_gradient))
