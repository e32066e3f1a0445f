"""Losses of both players as functions of logits, per sample.

With logits r = D(x) of real and ℓ = D(G(z)) of fake samples, log σ(ℓ) = −softplus(−ℓ) and
log(1 − σ(ℓ)) = −softplus(ℓ), which are finite for every logit.

| name | discriminator | generator |
| --- | --- | --- |
| ``minimax`` | softplus(−r) + softplus(ℓ) | softplus(−r) − softplus(ℓ) |
| ``nonsaturating`` | softplus(−r) + softplus(ℓ) | softplus(−ℓ) |
| ``least_squares`` | (r − 1)² + ℓ² | (ℓ − 1)² |
| ``hinge`` | relu(1 − r) + relu(1 + ℓ) | −ℓ |
| ``wasserstein`` | ℓ − r | −ℓ |
| ``relativistic`` | softplus(ℓ − r) | softplus(r − ℓ) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import relu

from gatdist.common.registry import Registry

LogitsFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sum:
    """f(r) + h(ℓ), whose two gradients can be computed separately.

    Attributes:
        real: f of real logits [n]; returns [n].
        fake: h of fake logits [n]; returns [n].
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.real(real) + self.fake(fake)


@dataclass(frozen=True)
class Loss:
    """The losses of both players: functions of real logits [n] and fake logits [n] that return [n].

    Attributes:
        discriminator: The discriminator's loss. A :class:`Sum` takes less memory.
        generator: The generator's loss.
        ratio: γ = (∂generator/∂ℓ) / (∂discriminator/∂ℓ) in closed form, for the rule ``one_stage``.
            None rules that out (the denominator is 0 on a range of ℓ).
        generator_reads_real: Whether ``generator`` uses the real logits.
        zero_sum: Whether the derivatives of both losses by ℓ are opposite.
    """

    discriminator: LogitsFunction
    generator: LogitsFunction
    ratio: LogitsFunction | None = None
    generator_reads_real: bool = False
    zero_sum: bool = False


losses: Registry[Loss] = Registry("game.loss")


def register_loss(name: str, loss: Loss) -> Loss:
    """Make ``loss`` available as ``game.loss = name`` and return it."""
    return losses.register(name)(loss)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) in full precision.

    Torch's becomes linear at 20, an error of 2e-9; at 40 the error is below float64's precision.
    """
    return functional.softplus(x, threshold=40)


def _minus_one(real: Tensor, fake: Tensor) -> Tensor:
    return fake.new_full(fake.shape, -1.0)


_cross_entropy = Sum(real=lambda real: softplus(-real), fake=softplus)

_LOSSES = {
    # Goodfellow et al. 2014: the discriminator ascends V = E[log D(x)] + E[log(1 − D(G(z)))], so it
    # descends −V here. (The GAT article prints L_D = V and lets the discriminator descend it.) The
    # generator's first term, −log D(x), does not depend on G: it has a value but no gradient.
    "minimax": Loss(
        discriminator=_cross_entropy,
        generator=lambda real, fake: softplus(-real) - softplus(fake),
        ratio=_minus_one,
        generator_reads_real=True,
        zero_sum=True,
    ),
    # Goodfellow et al. 2014, §3: the same fixed point, but a gradient where D(G(z)) is near 0.
    "nonsaturating": Loss(
        discriminator=_cross_entropy,
        generator=lambda real, fake: softplus(-fake),
        ratio=lambda real, fake: -(-fake).exp(),
    ),
    # Mao et al. 2017, with the labels 0, 1 and 1.
    "least_squares": Loss(
        discriminator=Sum(real=lambda real: (real - 1).square(), fake=torch.square),
        generator=lambda real, fake: (fake - 1).square(),
        ratio=lambda real, fake: (fake - 1) / fake,
    ),
    # Lim & Ye 2017. No ratio, because the discriminator's derivative is 0 for ℓ < −1.
    "hinge": Loss(
        discriminator=Sum(real=lambda real: relu(1 - real), fake=lambda fake: relu(1 + fake)),
        generator=lambda real, fake: -fake,
    ),
    # Arjovsky et al. 2017; use it with the penalty ``wgan_gp``.
    "wasserstein": Loss(
        discriminator=Sum(real=torch.neg, fake=lambda fake: fake),
        generator=lambda real, fake: -fake,
        ratio=_minus_one,
        zero_sum=True,
    ),
    # Jolicoeur-Martineau 2019, paired; with R1 and R2 the loss of R3GAN (Huang et al. 2024).
    "relativistic": Loss(
        discriminator=lambda real, fake: softplus(fake - real),
        generator=lambda real, fake: softplus(real - fake),
        ratio=lambda real, fake: -(real - fake).exp(),
        generator_reads_real=True,
    ),
}
for _name, _loss in _LOSSES.items():
    register_loss(_name, _loss)
