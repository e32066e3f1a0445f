"""Losses of both players as functions of logits, per sample.

Everything works on logits r = D(x) of real and ℓ = D(G(z)) of fake samples, with log σ(ℓ) =
−softplus(−ℓ) and log(1 − σ(ℓ)) = −softplus(ℓ), which stay finite for any logit that a dtype can
hold.

| name | discriminator | generator |
| --- | --- | --- |
| ``minimax`` | softplus(−r) + softplus(ℓ) | softplus(−r) − softplus(ℓ) |
| ``nonsaturating`` | softplus(−r) + softplus(ℓ) | softplus(−ℓ) |
| ``relativistic`` | softplus(ℓ − r) | softplus(r − ℓ) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from gatdist.registry import Registry

LogitsFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A pair of losses.

    Each function maps (real logits [n], fake logits [n]) to a loss for each sample, [n].

    Attributes:
        discriminator: what the discriminator descends.
        generator: what the generator descends.
        ratio: γ = (∂generator/∂ℓ) / (∂discriminator/∂ℓ), in closed form, for the one-stage step;
            None where that step must not be used (the denominator can be 0).
        generator_reads_real: whether ``generator`` uses the real logits, which then have to be
            computed for it.
    """

    discriminator: LogitsFunction
    generator: LogitsFunction
    ratio: LogitsFunction | None = None
    generator_reads_real: bool = False


losses: Registry[Loss] = Registry("game.loss")


def register_loss(name: str, loss: Loss) -> Loss:
    """Make ``loss`` available as ``game.loss = name``. Returns it."""
    return losses.register(name)(loss)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) with full precision for any x.

    Torch's own becomes linear at 20, which costs 2e-9.
    """
    return -logsigmoid(-x)


def _minimax_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real) + softplus(fake)


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
        discriminator=_minimax_discriminator,
        generator=_minimax_generator,
        ratio=lambda real, fake: fake.new_full(fake.shape, -1.0),
        generator_reads_real=True,
    ),
)

# Goodfellow et al. 2014, §3: the same fixed point, but a gradient where the discriminator is sure.
nonsaturating = register_loss(
    "nonsaturating",
    Loss(
        discriminator=_minimax_discriminator,
        generator=lambda real, fake: softplus(-fake),
        ratio=lambda real, fake: -(-fake).exp(),
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
