"""Update rules: a step as a sequence of phases, each with its gradients and optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import Registry, call_with_options, user_code
from gatdist.config import BOTH, Config, GameConfig, PlayerName, PlayerOptimConfig, Schedule
from gatdist.game.adaptive_state import AdaptiveState
from gatdist.game.game import Game
from gatdist.game.penalties import Observations, ScheduledPenalty
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction, set_gradients

Direction = Literal["gradient", "optimistic", "conjugate"]


@dataclass(frozen=True)
class Hyperparameters:
    """Scheduled settings of an optimizer.

    Attributes:
        learning_rate: a number, or a float32 scalar on the device.
        betas: of Adam.
    """

    learning_rate: float | Tensor
    betas: tuple[float, float] = (0.0, 0.99)


@dataclass(frozen=True)
class Step:
    """The inputs of a step.

    Attributes:
        batch: this worker's share of a global batch per discriminator step, concatenated.
        optim: settings of the optimizers, by player.
        ema_weight: of the generator in its moving average, a number or a scalar on the device.
    """

    batch: Batch
    optim: Mapping[PlayerName, Hyperparameters]
    ema_weight: float | Tensor = 1.0


@dataclass(frozen=True)
class Phase:
    """Gradients of some players at one point, and the optimizer steps that follow.

    Attributes:
        name: for timing.
        players: whose gradients are computed, and who make an optimizer step.
        batch: samples of this worker.
        backward: leaves the gradients of one part's weighted losses in ``.grad``; returns what to
            report, by tag, one value per sample.
        origin: parameters by player to step from; None: from the present ones.
        is_last: whether none follows, as far as is known: a step that a lost worker interrupts is
            then over, and need not be undone.
    """

    name: str
    players: tuple[PlayerName, ...]
    batch: Batch
    backward: Callable[[Batch], Observations]
    origin: Mapping[PlayerName, Sequence[Tensor]] | None = None
    is_last: bool = False

    def gradients(
        self, game: Game, reduction: Reduction, parts: Sequence[Batch]
    ) -> list[Observations]:
        """Leave the players' gradients over the global batch in ``.grad``, on every worker."""
        networks = [getattr(game, name) for name in self.players]
        return reduction.gradients(networks, parts, self.backward)


@dataclass(frozen=True)
class ReducedPhase(Phase):
    """A phase whose gradients are a function of reduced ones, as in second-order rules.

    ``compute`` maps (reduction, parts) to each player's reduced gradient, and what to report.
    """

    compute: Callable[
        [Reduction, Sequence[Batch]], tuple[Mapping[PlayerName, list[Tensor]], list[Observations]]
    ] = lambda reduction, parts: ({}, [])

    def gradients(
        self, game: Game, reduction: Reduction, parts: Sequence[Batch]
    ) -> list[Observations]:
        found, observations = self.compute(reduction, parts)
        for name, gradients in found.items():
            set_gradients(trainable(getattr(game, name)), gradients)
        return observations


class UpdateRule(ABC):
    """Defines which gradients a step takes, at which point, in which order.

    A phase's gradients are computed after the optimizer steps of the phase before it, so a rule
    reads like the algorithm in its paper.

    Args:
        game: networks, losses, penalties.
        config: section ``game``. The rule's own options are keywords, from ``rule_options``.

    Attributes:
        direction: what the players' optimizers follow, unless their configuration says otherwise.
        second_order: whether it differentiates gradients, with bare networks.
        plain_descent: whether it requires optim.*.name = "sgd" without momentum.
        several_discriminator_steps: whether it supports ``game.num_discriminator_steps`` > 1.
        recordable: whether :attr:`variant` and the penalties due determine before a step what its
            phases do, so that a CUDA graph of one step serves others.
        notes: messages for the user; the reader empties the list.
        tags: observations whose means over the global batch :meth:`update` receives.
        tensors: the rule's state by name, identical on every rank, changed in place and saved in
            checkpoints.

    Raises:
        ConfigError: the rule does not suit this game.
    """

    direction: ClassVar[Direction] = "gradient"
    second_order: ClassVar[bool] = False
    plain_descent: ClassVar[bool] = False
    several_discriminator_steps: ClassVar[bool] = False
    recordable: ClassVar[bool] = False

    def __init__(self, game: Game, config: GameConfig) -> None:
        self.game = game
        self.config = config
        self.notes: list[str] = []
        self.tags: tuple[str, ...] = ()
        self.tensors: dict[str, Tensor] = {}

    @abstractmethod
    def phases(self, step: Step) -> Iterator[Phase]:
        """Yield the phases of one step, without those of separate penalties."""

    @cached_property
    def adaptive_states(self) -> dict[str, AdaptiveState]:
        return self.game.adaptive_states | {"rule": self}

    @cached_property
    def tracked_metrics(self) -> frozenset[str]:
        return frozenset(
            tag for adaptive_state in self.adaptive_states.values() for tag in adaptive_state.tags
        )

    def update(  # noqa: B027  (most rules have nothing to adapt)
        self, means: Mapping[str, Tensor], step: int, num_samples: int
    ) -> None:
        """See :meth:`gatdist.game.adaptive_state.AdaptiveState.update`."""

    def reconsider(self) -> None:  # noqa: B027
        """Adapt at the end of a log interval, where waiting for the device costs nothing.

        Decisions must be identical on every rank and after resuming.
        """

    def loaded(self) -> None:  # noqa: B027
        """Derive what the host remembers from :attr:`tensors`, which a checkpoint has set."""

    @property
    def variant(self) -> Hashable:
        """What :meth:`reconsider` decided. Steps are recorded anew when it changes."""
        return None

    def all_phases(self, step: Step) -> Iterator[Phase]:
        """Yield the phases of one step, those of separate penalties last."""
        penalties = self._penalty_phases(step)
        for phase in self.phases(step):
            yield replace(phase, is_last=False) if penalties and phase.is_last else phase
        yield from penalties

    def _penalty_phases(self, step: Step) -> list[Phase]:
        batch = step.batch.consecutive(self.config.num_discriminator_steps)[-1]
        phases = []
        for player in BOTH:
            due = [
                p
                for p in self.game.penalties
                if self.game.apart(p) and p.due(batch.step) and p.penalty.player == player
            ]
            if due:
                backward = partial(self._penalty, due)
                phases.append(Phase(f"{player}_penalty", (player,), batch, backward))
        return [replace(phase, is_last=phase is phases[-1]) for phase in phases]

    def _penalty(self, due: list[ScheduledPenalty], batch: Batch) -> Observations:
        loss, observations = self.game.penalty_loss(batch, due)
        torch.autograd.backward(loss)
        return observations


update_rules: Registry[type[UpdateRule]] = Registry("game.update_rule")


def register_update_rule(name: str) -> Callable[[type[UpdateRule]], type[UpdateRule]]:
    """Decorate an :class:`UpdateRule` to make it available as ``game.update_rule = name``."""
    return update_rules.register(name)


def build_update_rule(config: Config, game: Game) -> UpdateRule:
    """Build the rule that ``game.update_rule`` names, checked against the configuration.

    Raises:
        ConfigError: an unknown rule or option, or a combination that would be wrong or inexact.
        PluginError: a user's rule is no UpdateRule, or fails in its constructor.
    """
    kind: Any = update_rules[config.game.update_rule]
    name = config.game.update_rule
    if not (isinstance(kind, type) and issubclass(kind, UpdateRule)):
        raise PluginError("game.update_rule", f"must be a subclass of UpdateRule; found {kind!r}")
    with user_code("game.update_rule", "can't be built", value=name):
        rule: UpdateRule = call_with_options(
            kind, config.game.rule_options, "game.rule_options", game=game, config=config.game
        )
        rule.adaptive_states, rule.variant  # noqa: B018  (attributes that steps need)
    for name in BOTH:
        _check_optimizer(config, kind, name)
    _check_second_derivatives(config, kind, game)
    _check_discriminator_steps(config, kind)
    _check_reused_fakes(config)
    _check_recording(config, kind)
    return rule


def require_adversarial_only(game: Game, name: str) -> None:
    """Refuse losses of the generator that the rule ``name`` would not see."""
    rule = f"the rule {name!r} needs a generator whose loss is the adversarial one alone"
    hint = "Leave it out, or use the rule 'simultaneous'"
    if game.terms:
        raise ConfigError(f"game.terms.{game.terms[0].name}", rule, hint=hint)
    if game.adversarial_weight != Schedule.constant(1.0):
        raise ConfigError("game.adversarial_weight", rule, hint=hint)


def _check_optimizer(config: Config, kind: type[UpdateRule], name: PlayerName) -> None:
    player: PlayerOptimConfig = getattr(config.optim, name)
    conjugate = (player.direction or kind.direction) == "conjugate"
    if not (conjugate or kind.plain_descent):
        return
    what = "a conjugate direction" if conjugate else f"the rule {config.game.update_rule!r}"
    rule = f"{what} computes the whole step, so the optimizer must be plain descent"
    if player.name != "sgd":
        raise ConfigError(f"optim.{name}.name", rule, value=player.name, hint="Use 'sgd'")
    if player.momentum:
        raise ConfigError(f"optim.{name}.momentum", rule, value=player.momentum, hint="Use 0")


def second_derivatives(
    config: Config, kind: type[UpdateRule], game: Game, player: PlayerName
) -> list[str]:
    """Return what needs second derivatives of a player's network, for messages."""
    reasons = [
        f"the penalty {p.name!r}"
        for p in game.penalties
        if p.penalty.differentiates and p.penalty.player == player
    ]
    return reasons + [f"the rule {config.game.update_rule!r}"] * kind.second_order


def _check_second_derivatives(config: Config, kind: type[UpdateRule], game: Game) -> None:
    for name in config.precision.compile:
        if reasons := second_derivatives(config, kind, game, name):
            raise ConfigError(
                "precision.compile",
                f"a compiled network has no second derivatives, which {reasons[0]} needs",
                value=name,
                hint="Leave this network out",
            )
    if kind.second_order and config.precision.dtype == "float16":
        raise ConfigError(
            "precision.dtype",
            f"the rule {config.game.update_rule!r} is not linear in the scaled losses",
            value="float16",
            hint="Use 'bfloat16' or 'float32'",
        )


def _check_discriminator_steps(config: Config, kind: type[UpdateRule]) -> None:
    if kind.several_discriminator_steps:
        return
    for key, default in (("num_discriminator_steps", 1), ("generator_batch", None)):
        value = getattr(config.game, key)
        if value != default:
            hint = "Leave it out" if default is None else f"Use {default}"
            raise ConfigError(
                f"game.{key}",
                f"the rule {config.game.update_rule!r} steps both players together, once per step",
                value=value,
                hint=f"{hint}, or game.update_rule = 'alternating'",
            )


def _check_reused_fakes(config: Config) -> None:
    game = config.game
    if not game.reuse_fakes:
        return
    needed = {
        "game.update_rule": (game.update_rule, "alternating"),
        "game.latents": (game.latents, "shared"),
        "game.order": (game.order, "discriminator_first"),
        "game.num_discriminator_steps": (game.num_discriminator_steps, 1),
        "game.generator_batch": (game.generator_batch, None),
        "optim.generator.micro_batch": (config.optim.generator.micro_batch, None),
        "optim.discriminator.micro_batch": (config.optim.discriminator.micro_batch, None),
    }
    for field, (value, other) in needed.items():
        if value != other:
            hint = "Leave it out" if other is None else f"Use {other!r}"
            raise ConfigError(
                field,
                "does not go with game.reuse_fakes",
                value=value,
                hint=f"{hint}, or game.reuse_fakes = false",
            )


def _check_recording(config: Config, kind: type[UpdateRule]) -> None:
    if not config.precision.cuda_graphs:
        return
    if not kind.recordable:
        raise ConfigError(
            "precision.cuda_graphs",
            f"the rule {config.game.update_rule!r} decides within a step what to compute next",
            value=True,
            hint="Leave it out, or use another rule",
        )
    for name in BOTH:
        betas = getattr(config.optim, name).betas
        if not all(beta.is_constant for beta in betas):
            raise ConfigError(
                f"optim.{name}.betas",
                "must be constant under precision.cuda_graphs: a graph holds their values",
                hint="Leave precision.cuda_graphs out",
            )
    if config.precision.compile:
        raise ConfigError(
            "precision.compile",
            "does not go with precision.cuda_graphs",
            value=config.precision.compile[0],
            hint="Leave one of the two out",
        )


def trainable(network: nn.Module) -> list[Tensor]:
    """Return the trainable parameters."""
    return [p for p in network.parameters() if p.requires_grad]
