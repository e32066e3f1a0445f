"""Consensus optimization (Mescheder et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from gatdist.common.errors import ConfigError
from gatdist.config import GameConfig
from gatdist.game.game import Game
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Step, register_update_rule
from gatdist.game.updates.second_order import (
    Gradients,
    OfLastPart,
    SecondOrder,
    Vector,
    dot,
    gradient,
)
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction


@register_update_rule("consensus")
class Consensus(SecondOrder):
    """F + γ ∇(½ ‖F‖²), with F = (∇_θ L_G, ∇_ψ L_D) over the whole global batch.

    Since ‖F‖² is not linear in the batch, F is reduced first; then ∇(½ ‖F‖²) = JᵀF is linear in J,
    the derivative of F, and is summed part by part. ``strength`` is γ > 0.
    """

    recordable = True

    def __init__(self, game: Game, config: GameConfig, *, strength: float = 10.0) -> None:
        super().__init__(game, config)
        if strength <= 0:
            raise ConfigError("game.rule_options.strength", "must be above 0", value=strength)
        self.strength = strength

    def compute(
        self, step: Step, reduction: Reduction, parts: Sequence[Batch]
    ) -> tuple[Gradients, list[Observations]]:
        observations: list[Observations] = []

        @OfLastPart
        def field(part: Batch) -> tuple[Vector, Observations]:
            """Return a part's summand of F, differentiable, and what to report."""
            losses = self.losses(part)
            theta = gradient(losses.generator, self.theta, graph=True)
            return theta + gradient(losses.discriminator, self.psi, graph=True), losses.observations

        def summand(part: Batch) -> Vector:
            found, observed = field(part)
            observations.append(observed)
            return [g.detach().clone() for g in found]

        total = reduction.mean(map(summand, parts))

        def pulled(part: Batch) -> Vector:
            found, _ = field(part)
            return gradient(dot(found, total), [*self.theta, *self.psi])

        pull = reduction.mean(map(pulled, parts))
        both = [f + self.strength * p for f, p in zip(total, pull, strict=True)]
        cut = len(self.theta)
        return {"generator": both[:cut], "discriminator": both[cut:]}, observations
