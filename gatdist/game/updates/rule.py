"""What an update rule is: a sequence of phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import Registry, call_with_options, user_code
from gatdist.config import BOTH, Config, GameConfig, PlayerName, PlayerOptimConfig
from gatdist.game.adaptive_state import AdaptiveState
from gatdist.game.game import Game
from gatdist.game.penalties import Observations, ScheduledPenalty
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction, set_gradients

Direction = Literal["gradient", "optimistic", "conjugate"]


@dataclass(frozen=True)
class Step:
    """What a step is taken at.

    Attributes:
        batch: this worker's share: one global batch for each discriminator step, one after another.
        learning_rates: each player's, at this step: numbers, or scalars on the device.
    """

    batch: Batch
    learning_rates: Mapping[PlayerName, float | Tensor]


@dataclass(frozen=True)
class Phase:
    """Zero, gradients of the parts, reduce, judge, clip, move: for these players together.

    Attributes:
        name: for timing.
        players: whose gradients are computed, and who then move.
        batch: the samples that it is computed at.
        backward: leaves the gradients of one part's weighted losses in ``.grad``; returns what to
            report, by tag, one value a sample.
        origin: parameters by player, from where they move; None: from where they are.
    """

    name: str
    players: tuple[PlayerName, ...]
    batch: Batch
    backward: Callable[[Batch], Observations]
    origin: Mapping[PlayerName, Sequence[Tensor]] | None = None

    def gradients(
        self, game: Game, reduction: Reduction, parts: Sequence[Batch]
    ) -> list[Observations]:
        """Leave the players' gradients in ``.grad``, those of the global batch on every worker."""
        networks = [getattr(game, name) for name in self.players]
        return reduction.gradients(networks, parts, self.backward)


@dataclass(frozen=True)
class ReducedPhase(Phase):
    """A phase whose gradients are a function of reduced ones, as in second-order rules.

    Attributes:
        compute: (reduction, parts) → each player's gradient, reduced, and what to report.
    """

    compute: Callable[
        [Reduction, Sequence[Batch]], tuple[Mapping[PlayerName, list[Tensor]], list[Observations]]
    ] = lambda reduction, parts: ({}, [])

    def gradients(
        self, game: Game, reduction: Reduction, parts: Sequence[Batch]
    ) -> list[Observations]:
        """See :meth:`Phase.gradients`."""
        found, observations = self.compute(reduction, parts)
        for name, gradients in found.items():
            set_gradients(trainable(getattr(game, name)), gradients)
        return observations


class UpdateRule(ABC):
    """Decides which gradients are taken, at which point, in which order: the *field*.

    The step runs the phases one by one: a phase's gradients are computed after the one before it
    has moved its players, so a rule reads like the algorithm in its paper.

    Args:
        game: what is played.
        config: its section. The rule's own options come as keywords, from ``rule_options``.

    Attributes:
        direction: what the players' optimizers follow, unless their configuration says otherwise.
        second_order: whether it differentiates gradients, by bare networks.
        plain_descent: whether its step is only right with optim.*.name = "sgd" without momentum.
        several_discriminator_steps: whether it knows ``game.num_discriminator_steps``.
        recordable: whether what its phases do is decided before the step, by :attr:`variant` and by
            which penalties are due, so that a CUDA graph of one step does for others.
        notes: what a person should be told once; whoever tells it takes it out.
        tags: observations whose means over the global batch :meth:`update` gets.
        tensors: all that it remembers from step to step and that changes what it computes, by name,
            changed in place, the same on all workers. Checkpoints hold them.

    Raises:
        ConfigError: the rule is not right for this game, by name, with what to use instead.
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
        """The phases of one step, but for those of separate penalties."""

    @cached_property
    def adaptive_states(self) -> dict[str, AdaptiveState]:
        """All that is adaptive, by name: the game's learners and the rule itself."""
        return self.game.adaptive_states | {"rule": self}

    @cached_property
    def tracked_metrics(self) -> frozenset[str]:
        """The tags of all observations that a learner wants."""
        return frozenset(
            tag for adaptive_state in self.adaptive_states.values() for tag in adaptive_state.tags
        )

    def update(  # noqa: B027  (most rules have nothing to adapt)
        self, means: Mapping[str, Tensor], step: int, num_samples: int
    ) -> None:
        """See :meth:`gatdist.game.adaptive_state.AdaptiveState.update`."""

    def reconsider(self) -> None:  # noqa: B027
        """Called at each tick, where waiting for the device costs nothing: adapt to what was seen.

        What is decided must be the same on all workers and after resuming.
        """

    def loaded(self) -> None:  # noqa: B027
        """Called when :attr:`tensors` were loaded: derive from them what the host remembers."""

    @property
    def variant(self) -> Hashable:
        """What :meth:`reconsider` has decided: steps are recorded anew when it changes."""
        return None

    def all_phases(self, step: Step) -> Iterator[Phase]:
        """The phases of one step, those of the penalties that have steps of their own last."""
        yield from self.phases(step)
        batch = step.batch.consecutive(self.config.num_discriminator_steps)[-1]
        for player in BOTH:
            due = [
                p
                for p in self.game.penalties
                if self.game.apart(p) and p.due(batch.step) and p.penalty.player == player
            ]
            if due:
                backward = partial(self._penalty, due)
                yield Phase(f"{player}_penalty", (player,), batch, backward)

    def _penalty(self, due: list[ScheduledPenalty], batch: Batch) -> Observations:
        loss, observations = self.game.penalty_loss(batch, due)
        torch.autograd.backward(loss)
        return observations


update_rules: Registry[type[UpdateRule]] = Registry("game.update_rule")


def register_update_rule(name: str) -> Callable[[type[UpdateRule]], type[UpdateRule]]:
    """Decorator: makes an :class:`UpdateRule` available as ``game.update_rule = name``."""
    return update_rules.register(name)


def build_update_rule(config: Config, game: Game) -> UpdateRule:
    """The rule that ``game.update_rule`` names, checked against the rest of the configuration.

    Raises:
        ConfigError: an unknown rule or option, or a combination that would be wrong or inexact.
        PluginError: a user's rule is none, or fails in its constructor.
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
    _check_kept_fakes(config)
    _check_recording(config, kind)
    return rule


def _check_optimizer(config: Config, kind: type[UpdateRule], name: PlayerName) -> None:
    player: PlayerOptimConfig = getattr(config.optim, name)
    conjugate = (player.direction or kind.direction) == "conjugate"
    if not (conjugate or kind.plain_descent):
        return
    what = "a conjugate direction" if conjugate else f"the rule {config.game.update_rule!r}"
    if player.name != "sgd":
        raise ConfigError(
            f"optim.{name}.name",
            f"{what} finds the whole step by itself, so the optimizer must be plain descent",
            value=player.name,
            hint="Use 'sgd'",
        )
    if player.momentum:
        raise ConfigError(
            f"optim.{name}.momentum",
            f"{what} finds the whole step by itself, without momentum",
            value=player.momentum,
            hint="Use 0",
        )


def _check_second_derivatives(config: Config, kind: type[UpdateRule], game: Game) -> None:
    for name in config.precision.compile:
        reasons = [
            f"the penalty {p.name!r}"
            for p in game.penalties
            if p.penalty.differentiates and p.penalty.player == name
        ]
        if kind.second_order:
            reasons.append(f"the rule {config.game.update_rule!r}")
        if reasons:
            raise ConfigError(
                "precision.compile",
                f"a compiled network has no second derivatives, which {reasons[0]} needs",
                value=name,
                hint="Leave this network out",
            )
    if kind.second_order and config.precision.dtype == "float16":
        raise ConfigError(
            "precision.dtype",
            f"the scaled losses of float16 do not suit {config.game.update_rule!r}, whose step is "
            "not linear in them",
            value="float16",
            hint="Use 'bfloat16' or 'float32'",
        )


def _check_discriminator_steps(config: Config, kind: type[UpdateRule]) -> None:
    count = config.game.num_discriminator_steps
    if count > 1 and not kind.several_discriminator_steps:
        raise ConfigError(
            "game.num_discriminator_steps",
            f"the rule {config.game.update_rule!r} moves both players together, once a step",
            value=count,
            hint="Use 1, or game.update_rule = 'alternating'",
        )


def _check_kept_fakes(config: Config) -> None:
    game = config.game
    if not game.reuse_fakes:
        return
    wrong = [
        (game.update_rule != "alternating", "game.update_rule", game.update_rule, "alternating"),
        (game.latents != "shared", "game.latents", game.latents, "shared"),
        (game.order != "discriminator_first", "game.order", game.order, "discriminator_first"),
        (
            game.num_discriminator_steps > 1,
            "game.num_discriminator_steps",
            game.num_discriminator_steps,
            1,
        ),
        *(
            (size is not None, f"optim.{name}.micro_batch", size, None)
            for name in BOTH
            for size in [getattr(config.optim, name).micro_batch]
        ),
    ]
    for is_wrong, field, value, needed in wrong:
        if is_wrong:
            hint = "Leave it out" if needed is None else f"Use {needed!r}"
            raise ConfigError(
                field,
                "does not go with game.reuse_fakes",
                value=value,
                hint=f"{hint}, or keep none",
            )


def _check_recording(config: Config, kind: type[UpdateRule]) -> None:
    if not config.precision.cuda_graphs:
        return
    if not kind.recordable:
        raise ConfigError(
            "precision.cuda_graphs",
            f"the rule {config.game.update_rule!r} decides within a step how to go on, which a "
            "recorded step can't",
            value=True,
            hint="Leave it out, or use another rule",
        )
    if config.precision.compile:
        raise ConfigError(
            "precision.compile",
            "does not go with precision.cuda_graphs",
            value=config.precision.compile[0],
            hint="Leave one of the two out",
        )


def trainable(network: nn.Module) -> list[Tensor]:
    """The parameters that learn."""
    return [p for p in network.parameters() if p.requires_grad]
