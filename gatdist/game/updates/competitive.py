"""Competitive gradient descent (Schäfer & Anandkumar 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gatdist.common.errors import ConfigError
from gatdist.config import BOTH, GameConfig, PlayerName
from gatdist.game.game import Game
from gatdist.game.losses import losses
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Step, register_update_rule, require_adversarial_only
from gatdist.game.updates.second_order import (
    Gradients,
    Losses,
    OfLastPart,
    SecondOrder,
    Vector,
    dot,
    gradient,
)
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction


@register_update_rule("competitive")
class Competitive(SecondOrder):
    """Both players play the equilibrium of the game's local bilinear approximation.

    For the zero-sum value f, with A = ∂²f/∂θ∂ψ and learning rates η_θ, η_ψ::

        Δθ = −η_θ (I + η_θ η_ψ A Aᵀ)⁻¹ (∇_θ f + η_ψ A ∇_ψ f)
        Δψ =  η_ψ (∇_ψ f + Aᵀ Δθ)

    which for the second is the answer to Δθ, and equal to the paper's symmetric formula. The system
    is solved by conjugate gradients on mixed Hessian-vector products, each averaged over the global
    batch. The discriminator's penalties enter ∇_ψ f; A is that of the loss alone.

    Args:
        game: see :class:`UpdateRule`.
        config: likewise.
        tolerance: of the residual, relative to the right-hand side.
        max_iterations: of conjugate gradients, ≥ 1.

    Raises:
        ConfigError: the loss is not zero-sum, or the generator has other losses.
    """

    plain_descent = True

    def __init__(
        self,
        game: Game,
        config: GameConfig,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 30,
    ) -> None:
        super().__init__(game, config)
        if not game.loss.zero_sum:
            known = [name for name in losses.names() if losses[name].zero_sum]
            raise ConfigError(
                "game.loss",
                "is not zero-sum, as game.update_rule = 'competitive' needs",
                value=config.loss,
                hint=f"Use {' or '.join(known)}, or another rule",
            )
        require_adversarial_only(game, "competitive")
        for penalty in game.penalties:
            if penalty.penalty.player == "generator" and not game.apart(penalty):
                rule = "belongs to the generator, whose loss the rule 'competitive' takes as value"
                hint = "Leave it out, or use another rule"
                raise ConfigError(f"game.penalties.{penalty.name}", rule, hint=hint)
        for name, value in (("tolerance", tolerance), ("max_iterations", max_iterations)):
            if value <= 0:
                raise ConfigError(f"game.rule_options.{name}", "must be above 0", value=value)
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def compute(
        self, step: Step, reduction: Reduction, parts: Sequence[Batch]
    ) -> tuple[Gradients, list[Observations]]:
        theta, psi = self.theta, self.psi
        rate_theta, rate_psi = (float(step.optim[name].learning_rate) for name in BOTH)
        observations: list[Observations] = []

        @OfLastPart
        def linearized(part: Batch) -> tuple[Losses, Gradients]:
            """Return a part's losses, and the differentiable gradients of f = −L_D by player."""
            losses = self.losses(part)
            both = gradient(-losses.value, [*theta, *psi], graph=True)
            return losses, {"generator": both[: len(theta)], "discriminator": both[len(theta) :]}

        def gradients(part: Batch) -> Vector:
            losses, of = linearized(part)
            observations.append(losses.observations)
            of_psi = gradient(losses.discriminator, psi, keep=True)  # −∇_ψ f, penalties included
            return [g.detach().clone() for g in of["generator"]] + of_psi

        both = reduction.mean(map(gradients, parts))
        f_theta, minus_f_psi = both[: len(theta)], both[len(theta) :]

        def mixed(first: PlayerName, second: Vector, vector: Vector) -> Vector:
            """∂/∂second ⟨∂f/∂first, vector⟩ over the global batch."""

            def at(part: Batch) -> Vector:
                _, of = linearized(part)
                return gradient(dot(of[first], vector), second, keep=True)

            return reduction.mean(map(at, parts))

        def a(vector: Vector) -> Vector:
            return mixed("discriminator", theta, vector)

        def a_transposed(vector: Vector) -> Vector:
            return mixed("generator", psi, vector)

        def system(vector: Vector) -> Vector:
            return _add(vector, rate_theta * rate_psi, a(a_transposed(vector)))

        right = _add(f_theta, -rate_psi, a(minus_f_psi))
        solution, iterations = conjugate_gradients(
            system, right, self.tolerance, self.max_iterations
        )
        of_psi = _add(minus_f_psi, rate_theta, a_transposed(solution))
        observations[0]["competitive/iterations"] = torch.tensor(float(iterations))
        return {"generator": solution, "discriminator": of_psi}, observations


def conjugate_gradients(
    system: Callable[[Vector], Vector], right: Vector, tolerance: float, max_iterations: int
) -> tuple[Vector, int]:
    """Solve ``system(x) = right`` for a symmetric positive definite ``system``, from x = 0.

    (Hestenes & Stiefel 1952.) Waits for the device once per iteration. Returns x and the number of
    iterations.
    """
    x = [torch.zeros_like(r) for r in right]
    residual, direction = list(right), list(right)
    squared = dot(residual, residual)
    goal = float(squared) * tolerance**2
    for iteration in range(max_iterations):
        if not float(squared) > goal:  # also where it is not finite
            return x, iteration
        image = system(direction)
        length = squared / dot(direction, image)
        x = _add(x, length, direction)
        residual = _add(residual, -length, image)
        before, squared = squared, dot(residual, residual)
        direction = _add(residual, squared / before, direction)
    return x, max_iterations


def _add(a: Vector, factor: float | torch.Tensor, b: Vector) -> Vector:
    return [x + factor * y for x, y in zip(a, b, strict=True)]
