"""Losses of both players as functions of logits, per sample.

Everything works on logits r = D(x) of real and ℓ = D(G(z)) of fake samples, with log σ(ℓ) =
−softplus(−ℓ) and log(1 − σ(ℓ)) = −softplus(ℓ), which stay finite for any logit that a dtype can
hold.

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
    """f(r) + h(ℓ): the gradient of either half can be taken without the other.

    Attributes:
        real: f, of real logits [n]; gives [n].
        fake: h, of fake logits [n]; gives [n].
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Both halves, [n]."""
        return self.real(real) + self.fake(fake)


@dataclass(frozen=True)
class Loss:
    """A pair of losses.

    Each function maps (real logits [n], fake logits [n]) to a loss for each sample, [n].

    Attributes:
        discriminator: what the discriminator descends; a :class:`Sum` where it is one, for then a
            step takes less memory.
        generator: what the generator descends.
        ratio: γ = (∂generator/∂ℓ) / (∂discriminator/∂ℓ), in closed form, for the one-stage step;
            None where that step must not be used (the denominator is 0 for whole ranges of ℓ).
        generator_reads_real: whether ``generator`` uses the real logits, which then have to be
            computed for it.
        zero_sum: whether what one player gains by moving ℓ the other loses, so that the loss is a
            single function that one descends and the other ascends.
    """

    discriminator: LogitsFunction
    generator: LogitsFunction
    ratio: LogitsFunction | None = None
    generator_reads_real: bool = False
    zero_sum: bool = False


losses: Registry[Loss] = Registry("game.loss")


def register_loss(name: str, loss: Loss) -> Loss:
    """Make ``loss`` available as ``game.loss = name``. Returns it."""
    return losses.register(name)(loss)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) with full precision for any x.

    Torch's own becomes linear at 20, which costs 2e-9; at 40 the difference is below float64's.
    """
    return functional.softplus(x, threshold=40)


_cross_entropy = Sum(real=lambda real: softplus(-real), fake=softplus)


def _minimax_generator(real: Tensor, fake: Tensor) -> Tensor:
    """L_G = −log D(x) + log(1 − D(G(z))).

    The article prints L_D = E[log D(x)] + E[log(1 − D(G(z)))] and lets the discriminator *descend*
    it; but that is the value V(G, D) which the discriminator must maximize (Goodfellow et al.
    2014), so it descends −V here. The first term of L_G does not depend on the generator: it is in
    the reported value and has no gradient.
    """
    return softplus(-real) - softplus(fake)


minimax = register_loss(
    "minimax",
    Loss(
        discriminator=_cross_entropy,
        generator=_minimax_generator,
        ratio=lambda real, fake: fake.new_full(fake.shape, -1.0),
        generator_reads_real=True,
        zero_sum=True,
    ),
)

# Goodfellow et al. 2014, §3: the same fixed point, but a gradient where the discriminator is sure.
nonsaturating = register_loss(
    "nonsaturating",
    Loss(
        discriminator=_cross_entropy,
        generator=lambda real, fake: softplus(-fake),
        ratio=lambda real, fake: -(-fake).exp(),
    ),
)

# Mao et al. 2017, with the labels 0, 1 and 1.
least_squares = register_loss(
    "least_squares",
    Loss(
        discriminator=Sum(real=lambda real: (real - 1).square(), fake=torch.square),
        generator=lambda real, fake: (fake - 1).square(),
        ratio=lambda real, fake: (fake - 1) / fake,
    ),
)

# Lim & Ye 2017; no ratio, since d′ = 0 for every fake beyond the margin.
hinge = register_loss(
    "hinge",
    Loss(
        discriminator=Sum(real=lambda real: relu(1 - real), fake=lambda fake: relu(1 + fake)),
        generator=lambda real, fake: -fake,
    ),
)

# Arjovsky et al. 2017; to be used with the penalty ``wgan_gp``.
wasserstein = register_loss(
    "wasserstein",
    Loss(
        discriminator=Sum(real=torch.neg, fake=lambda fake: fake),
        generator=lambda real, fake: -fake,
        ratio=lambda real, fake: fake.new_full(fake.shape, -1.0),
        zero_sum=True,
    ),
)

# Jolicoeur-Martineau 2019, paired; with R1 and R2 the loss of R3GAN (Huang et al. 2024).
relativistic = register_loss(
    "relativistic",
    Loss(
        discriminator=lambda real, fake: softplus(fake - real),
        generator=lambda real, fake: softplus(real - fake),
        ratio=lambda real, fake: -(real - fake).exp(),
        generator_reads_real=True,
    ),
)
