"""Policies that look at a tick's numbers and return decisions; the loop carries them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
    accuracy = values.get("logits/pairwise_accuracy")
    if accuracy is not None and accuracy > config.won_accuracy:
        raised.append(
            Alarm(
                "discriminator_won",
                f"the discriminator tells {accuracy:.1%} of the pairs apart and has won; "
                "try stronger r1 and r2 penalties or a lower optim.discriminator.learning_rate",
            )
        )
    return raised


@dataclass(frozen=True)
class Counts:
    """What has gone wrong in a run so far.

    Attributes:
        nonfinite: phases whose gradients were not finite; they moved nobody.
        spikes: phases whose gradients were far too large; neither.
        rollbacks: times the run went back.
    """

    nonfinite: int
    spikes: int
    rollbacks: int

    def since(self, earlier: Counts) -> Counts:
        """What has come since ``earlier``."""
        return Counts(
            self.nonfinite - earlier.nonfinite,
            self.spikes - earlier.spikes,
            self.rollbacks - earlier.rollbacks,
        )


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        action: to be carried out by the loop.
        message: why; empty where there is nothing to tell.
    """

    action: Literal["go_on", "rollback", "stop"]
    message: str = ""


def decide(config: HealthConfig, counts: Counts, new: Counts) -> Decision:
    """What follows from bad steps, from counts that are the same on all workers.

    Args:
        config: the policy.
        counts: of the whole run.
        new: of the tick that ends.
    """
    kinds = (
        ("nonfinite", "had gradients that are not finite", counts.nonfinite, new.nonfinite),
        ("spike", f"had gradients {config.spike_factor:g} × the usual", counts.spikes, new.spikes),
    )
    skipped = [
        f"{fresh} {_steps(fresh)} {what} ({count} so far)"
        for key, what, count, fresh in kinds
        if fresh and getattr(config, key) != "off"
    ]
    message = f"{', '.join(skipped)} and were skipped on every rank" if skipped else ""
    decision = Decision("go_on", message)
    for key, what, count, fresh in kinds:
        policy = getattr(config, key)
        if not count or policy == "off":
            continue
        budget = 0 if policy == "stop" else getattr(config, f"{key}_budget")
        if count > budget:
            return Decision(
                "stop",
                f"{count} {_steps(count)} {what}, and health.{key} = {policy!r} allows {budget}. "
                f"No parameter moved in them. {_REMEDY}",
            )
        if fresh and policy == "rollback":
            message = f"{fresh} {_steps(fresh)} {what}"
            if counts.rollbacks >= config.rollback_budget:
                return Decision(
                    "stop",
                    f"{message} after {counts.rollbacks} rollbacks, which is all that "
                    f"health.rollback_budget allows. {_REMEDY}",
                )
            decision = Decision("rollback", f"{message}: going back to the last checkpoint")
    return decision


_REMEDY = "Try lower learning rates, optim.*.clip_norm, or stronger penalties"


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


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
