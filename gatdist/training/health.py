"""Policies that look at a tick's numbers and return decisions; the loop carries them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gatdist.config import ConvergenceConfig, HealthConfig


@dataclass(frozen=True)
class Alarm:
    """Something a person should know.

    Attributes:
        name: the tag after ``health/``.
        message: what was seen, what it means, and what to try.
    """

    name: str
    message: str


def alarms(config: HealthConfig, values: dict[str, float]) -> list[Alarm]:
    """The alarms that a tick's means raise.

    ``values`` are keyed by tag; tags that are absent raise nothing.
    """
    raised = []
    for player in ("generator", "discriminator"):
        norm = values.get(f"gradient_norm/{player}")
        if norm is not None and norm < config.vanishing_norm:
            remedy = "try game.loss = 'nonsaturating' or 'relativistic', or a slower discriminator"
            raised.append(
                Alarm(
                    f"vanishing_gradient_{player}",
                    f"the {player}'s gradient vanishes ({norm:.1e}): {remedy}",
                )
            )
        if norm is not None and norm > config.exploding_norm:
            remedy = f"try optim.{player}.clip_norm, a lower learning rate, or stronger r1 and r2"
            raised.append(
                Alarm(
                    f"exploding_gradient_{player}",
                    f"the {player}'s gradient explodes ({norm:.1e}): {remedy}",
                )
            )
    ratio = values.get("diversity/ratio")
    if ratio is not None and ratio < config.collapse_ratio:
        raised.append(
            Alarm(
                "collapse",
                f"fakes vary {ratio:.0%} as much as real samples: the generator has collapsed; "
                "try r1 and r2 penalties, game.loss = 'relativistic', or a lower learning rate",
            )
        )
    accuracy = values.get("logits/pairs_ranked_rightly")
    if accuracy is not None and accuracy > config.won_accuracy:
        raised.append(
            Alarm(
                "discriminator_won",
                f"the discriminator tells {accuracy:.1%} of the pairs apart and has won; "
                "try stronger r1 and r2 penalties or a lower optim.discriminator.learning_rate",
            )
        )
    return raised


def nonfinite_verdict(config: HealthConfig, skipped: int) -> str | None:
    """Why the run must stop after ``skipped`` non-finite steps in all; None if it may go on."""
    budget = 0 if config.nonfinite == "stop" else config.nonfinite_budget
    if skipped <= budget:
        return None
    return (
        f"{skipped} steps had gradients that are not finite, and health.nonfinite = "
        f"{config.nonfinite!r} allows {budget}. No parameter moved in them. "
        "Try lower learning rates, optim.*.clip_norm, or stronger penalties"
    )


@dataclass
class Convergence:
    """Says when a metric has stopped to improve.

    The rule: stop when ``metric`` (lower is better) has not fallen below its best by
    ``min_improvement`` (a share of the best) for ``patience_samples``.
    """

    config: ConvergenceConfig | None
    best: float = field(default=float("inf"))
    best_samples: int = 0

    def update(self, samples_seen: int, metrics: dict[str, float]) -> str | None:
        """Take note of an evaluation. Returns why the run has converged, or None."""
        if self.config is None or self.config.metric not in metrics:
            return None
        value = metrics[self.config.metric]
        if value < self.best * (1 - self.config.min_improvement):
            self.best, self.best_samples = value, samples_seen
        waited = samples_seen - self.best_samples
        if waited < self.config.patience_samples:
            return None
        return (
            f"{self.config.metric} has not improved on {self.best:.4g} for {waited:,} samples "
            f"(run.convergence.patience_samples = {self.config.patience_samples:,})"
        )

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        return {
            "best": None if self.best == float("inf") else self.best,
            "best_samples": self.best_samples,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.best = float("inf") if state["best"] is None else state["best"]
        self.best_samples = state["best_samples"]
