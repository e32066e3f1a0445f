"""Non-finite and exploding gradients, alarms and convergence: detection and policies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gatdist.config import ConvergenceConfig, HealthConfig, PlayerName
from gatdist.monitor.numbers import percent

# A norm is compared with the mean of at least this many others.
_WARM_UP_STEPS = 100
_DECAY = 0.99


class Guard:
    """Decide for each phase, on the device, whether its players may make an optimizer step.

    The norms are of reduced gradients, so the decision is identical on every rank.

    Attributes:
        tensors: ``nonfinite`` and ``spikes``, int64 counts of skipped phases; ``norm/PLAYER``,
            running means of gradient norms, and ``count/PLAYER``, the number of norms in them.
    """

    def __init__(
        self, config: HealthConfig, players: tuple[str, ...], device: torch.device
    ) -> None:
        self._factor = config.spike_factor if config.spike != "off" else None
        self.tensors = {
            name: torch.zeros((), dtype=torch.int64, device=device)
            for name in ("nonfinite", "spikes")
        }
        if self._factor is not None:
            for name in players:
                self.tensors[f"norm/{name}"] = torch.zeros((), dtype=torch.float64, device=device)
                self.tensors[f"count/{name}"] = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, norms: Mapping[PlayerName, Tensor], excused: Tensor | None = None) -> Tensor:
        """Return 1.0 if all ``norms`` (by player) are finite and none is a spike, else 0.0.

        Where ``excused`` is true, non-finite norms are not counted.
        """
        finite = all_finite(norms)
        counted = ~finite if excused is None else ~finite & ~excused
        self.tensors["nonfinite"] += counted
        if self._factor is None:
            return finite.float()
        calm = torch.stack([self._is_calm(name, norm) for name, norm in norms.items()]).all()
        self.tensors["spikes"] += finite & ~calm
        ok = finite & calm
        for name, norm in norms.items():
            mean, count = self.tensors[f"norm/{name}"], self.tensors[f"count/{name}"]
            count += ok
            # The mean of the first few, then an exponential one.
            share = (1.0 / count.clamp_min(1)).clamp_min(1 - _DECAY)
            mean.copy_(mean.lerp(norm.to(mean.dtype), share).where(ok, mean))
        return ok.float()

    def _is_calm(self, name: str, norm: Tensor) -> Tensor:
        mean, count = self.tensors[f"norm/{name}"], self.tensors[f"count/{name}"]
        assert self._factor is not None
        return (count < _WARM_UP_STEPS) | (norm <= self._factor * mean)


def all_finite(norms: Mapping[PlayerName, Tensor]) -> Tensor:
    """Return whether every norm (≥ 0) is finite, a boolean scalar."""
    first, *others = norms.values()
    return sum(others, first) < math.inf


class LossScaler:
    """Dynamic loss scale for float16 (Micikevicius et al. 2018), identical on every rank.

    It doubles after ``GROWTH_STEPS`` finite phases in a row, and halves after a non-finite one.

    Attributes:
        tensors: ``scale``, and ``good_steps`` since it last changed.
    """

    INITIAL, GROWTH_STEPS = 2.0**16, 2000

    def __init__(self, device: torch.device) -> None:
        self.tensors = {
            "scale": torch.full((), self.INITIAL, device=device),
            "good_steps": torch.zeros((), dtype=torch.int64, device=device),
        }

    @property
    def scale(self) -> Tensor:
        """Factor of the losses: a scalar ≥ 1."""
        return self.tensors["scale"]

    @property
    def may_overflow(self) -> Tensor:
        """True while a smaller scale could make a non-finite gradient finite."""
        return self.scale > 1

    def update(self, finite: Tensor) -> None:
        """Update the scale after a phase whose gradients were ``finite``, a boolean scalar."""
        good = self.tensors["good_steps"]
        good.copy_((good + 1).where(finite, 0))
        grows = good >= self.GROWTH_STEPS
        scale = self.scale.where(finite, (self.scale / 2).clamp_min(1))
        self.scale.copy_(torch.where(grows, scale * 2, scale))
        good.copy_(good.where(~grows, 0))


@dataclass(frozen=True)
class Alarm:
    """A condition that a person should know of.

    Attributes:
        name: the tag after ``health/``.
        message: what was observed, what it means, and what to try.
    """

    name: str
    message: str


def alarms(config: HealthConfig, values: dict[str, float]) -> list[Alarm]:
    """Return the alarms that the means of a log interval raise, by tag; absent tags raise none."""
    raised = []
    for player in ("generator", "discriminator"):
        norm = values.get(f"gradient_norm/{player}", math.nan)
        if norm < config.vanishing_norm:
            remedy = "try game.loss = 'nonsaturating' or 'relativistic', or a slower discriminator"
            message = f"the {player}'s gradient vanishes ({norm:.1e}): {remedy}"
            raised.append(Alarm(f"vanishing_gradient_{player}", message))
        if norm > config.exploding_norm:
            remedy = f"try optim.{player}.clip_norm, a lower learning rate, or stronger r1 and r2"
            message = f"the {player}'s gradient explodes ({norm:.1e}): {remedy}"
            raised.append(Alarm(f"exploding_gradient_{player}", message))
    ratio = values.get("diversity/ratio", math.nan)
    if ratio < config.collapse_ratio:
        message = (
            f"fakes vary {ratio:.0%} as much as real samples: the generator has collapsed; "
            "try r1 and r2 penalties, game.loss = 'relativistic', or a lower learning rate"
        )
        raised.append(Alarm("collapse", message))
    accuracy = values.get("logits/pairwise_accuracy", math.nan)
    if accuracy > config.won_accuracy and not _carried_by_terms(values):
        message = (
            f"the discriminator separates {accuracy:.1%} of the pairs and has won; "
            "try stronger r1 and r2 penalties or a lower optim.discriminator.learning_rate"
        )
        raised.append(Alarm("discriminator_won", message))
    return raised


def time_lost(config: HealthConfig, before: float, now: float) -> str:
    """Return a warning if changes of workers have come to take too much time, else "".

    Args:
        config: the threshold.
        before: share of an hour that changes had taken until the last one.
        now: the same with the last one.
    """
    if not before <= config.lost_share < now:
        return ""
    return (
        f"changes of workers and the steps that they undid have taken {percent(now)} of an hour, "
        f"more than health.lost_share = {config.lost_share:g}: the hosts are unreliable. "
        "gatdist inspect shows the causes; use other hosts, or fewer"
    )


def _carried_by_terms(values: dict[str, float]) -> bool:
    """Return whether terms are at least half of the generator's loss.

    They train it whatever the discriminator says, which may then separate every pair: outputs need
    not look real to be near their targets.
    """
    terms = values.get("loss/terms", 0.0)
    return terms > 0 and terms >= values.get("loss/generator", math.inf) - terms


@dataclass(frozen=True)
class Counts:
    """Numbers of bad events in a run.

    Attributes:
        nonfinite: phases skipped because of non-finite gradients.
        spikes: phases skipped because of far too large gradients.
        rollbacks: rollbacks to a checkpoint.
    """

    nonfinite: int
    spikes: int
    rollbacks: int

    def since(self, earlier: Counts) -> Counts:
        """Return the difference from ``earlier``."""
        return Counts(*(now - getattr(earlier, name) for name, now in asdict(self).items()))


@dataclass(frozen=True)
class Decision:
    """What the loop must do, and why ("" where there is nothing to report)."""

    action: Literal["go_on", "rollback", "stop"]
    message: str = ""


def decide(config: HealthConfig, counts: Counts, new: Counts) -> Decision:
    """Decide what follows from skipped steps, from counts that are identical on every rank.

    Args:
        config: the policy.
        counts: of the whole run.
        new: of the log interval that ends.
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
                f"They changed no parameter. {_REMEDY}",
            )
        if fresh and policy == "rollback":
            message = f"{fresh} {_steps(fresh)} {what}"
            if counts.rollbacks >= config.rollback_budget:
                return Decision(
                    "stop",
                    f"{message} after {counts.rollbacks} rollbacks, the most that "
                    f"health.rollback_budget allows. {_REMEDY}",
                )
            decision = Decision("rollback", f"{message}: going back to the last checkpoint")
    return decision


_REMEDY = "Try lower learning rates, optim.*.clip_norm, or stronger penalties"


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


@dataclass
class Convergence:
    """Early stopping: ``metric`` has not improved by ``min_improvement`` for ``patience_samples``.

    ``min_improvement`` is a share of the best value so far, which is the lowest unless
    ``higher_is_better``.
    """

    config: ConvergenceConfig | None
    best: float | None = None
    best_samples: int = 0
    higher_is_better: bool = False

    def update(self, samples_seen: int, metrics: dict[str, float]) -> str | None:
        """Record an evaluation. Return why the run has converged, or None."""
        if self.config is None or self.config.metric not in metrics:
            return None
        value = metrics[self.config.metric]
        if math.isfinite(value) and self._is_improved(value, self.config.min_improvement):
            self.best, self.best_samples = value, samples_seen
        waited = samples_seen - self.best_samples
        if waited < self.config.patience_samples:
            return None
        return (
            f"{self.config.metric} has not improved on {_shown(self.best)} for {waited:,} samples "
            f"(run.convergence.patience_samples = {self.config.patience_samples:,})"
        )

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint."""
        return {"best": self.best, "best_samples": self.best_samples}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.best, self.best_samples = state["best"], state["best_samples"]

    def _is_improved(self, value: float, by: float) -> bool:
        if self.best is None:
            return True
        if self.higher_is_better:
            return value > self.best + by * abs(self.best)
        return value < self.best * (1 - by)


def _shown(best: float | None) -> str:
    return "inf" if best is None else f"{best:.4g}"
