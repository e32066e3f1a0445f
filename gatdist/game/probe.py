"""Finds out with two samples whether a rule, its penalties, the loss and the networks fit."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import described, user_code
from gatdist.config import BOTH, Config
from gatdist.game.losses import Loss, Sum
from gatdist.game.penalties import ScheduledPenalty
from gatdist.game.snapshots import changed, object_states
from gatdist.game.updates.rule import Phase, Step, UpdateRule
from gatdist.game.updates.second_order import SecondOrder
from gatdist.models import DTYPES
from gatdist.models.structure import dtype_name
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction

_NUM_SAMPLES = 2
# Where losses are looked at, away from the corners of common ones.
_REAL, _FAKE = (0.7, -1.2, 0.2, 1.6), (-1.5, -0.4, 0.3, 2.1)
# Of a rule, what is not its own state.
_NOT_STATE = frozenset(
    {"game", "config", "notes", "tags", "tensors", "adaptive_states", "tracked_metrics"}
)


def probe_batch(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    device: torch.device | None = None,
) -> Batch:
    """A step's batch with two samples for each discriminator step, uniform in (-1, 1)."""
    n = _NUM_SAMPLES * config.game.num_discriminator_steps
    positions = torch.arange(n, device=device)
    real = draws.uniform(0, "probe", positions, sample_shape, DTYPES[config.precision.dtype])
    has_labels = num_classes and config.model.conditional
    return Batch(
        real=2 * real - 1,
        labels=torch.zeros_like(positions) if has_labels else None,
        positions=positions,
        step=0,  # every lazy penalty is due at step 0
    )


def require_playable(
    config: Config, rule: UpdateRule, sample_shape: tuple[int, ...], num_classes: int
) -> list[str]:
    """Compute a step's gradients, without moving anything.

    Args:
        config: of the run.
        rule: between networks on one device; gradients are left in their parameters.
        sample_shape: of one sample.
        num_classes: of the data; 0 if unlabelled.

    Returns:
        Warnings.

    Raises:
        ConfigError: a network has no derivative that the rule or a penalty needs.
        PluginError: a user's loss or update rule fails or returns what it must not.
    """
    device = next(rule.game.generator.parameters()).device
    batch = probe_batch(config, sample_shape, num_classes, device)
    require_loss(config, rule.game.loss)
    for scheduled in rule.game.penalties:
        if scheduled.penalty.differentiates:
            _require_penalty(rule, scheduled, batch.consecutive(1)[0])
    if isinstance(rule, SecondOrder):
        _require_second_order(config, rule, batch)
    states = []
    for _ in range(1 if type(rule).__module__.startswith("gatdist.") else 3):
        _require_phases(config, rule, batch)
        states.append(object_states(rule, _NOT_STATE))
    return _hidden_state(config, changed(states[0], states[-1]) if len(states) > 1 else ())


def _require_phases(config: Config, rule: UpdateRule, batch: Batch) -> None:
    """Every phase is one, and its gradients can be computed."""
    subject, name = "game.update_rule", config.game.update_rule
    reduction = FastReduction(LocalCommunicator(batch.positions.device))
    rates = {player: getattr(config.optim, player).learning_rate for player in BOTH}
    with user_code(subject, f"a step with {_NUM_SAMPLES} samples fails", value=name):
        for phase in rule.all_phases(Step(batch, rates)):
            if not isinstance(phase, Phase):
                found = type(phase).__name__
                raise PluginError(subject, f"phases() must yield Phase; found {found}", value=name)
            if not phase.players or not set(phase.players) <= set(BOTH):
                raise PluginError(
                    subject,
                    f"the players of its phase {phase.name!r} must be among {', '.join(BOTH)}; "
                    f"found {phase.players!r}",
                    value=name,
                )
            observations = phase.gradients(rule.game, reduction, [phase.batch])
            for tag, value in (pair for part in observations for pair in part.items()):
                if not isinstance(value, Tensor):
                    raise PluginError(
                        subject,
                        f"what its phase {phase.name!r} observes must be tensors; found "
                        f"{type(value).__name__} for {tag!r}",
                        value=name,
                    )


def _hidden_state(config: Config, names: tuple[str, ...]) -> list[str]:
    """Refuse or warn of attributes of a rule that steps change."""
    if not names:
        return []
    name = config.game.update_rule
    rule = f"a step changes its attribute {names[0]!r}, which is not in checkpoints"
    hint = "Keep what changes results in tensors"
    if config.run.reduction == "canonical":
        raise PluginError("game.update_rule", rule, value=name, hint=hint)
    return [
        f"game.update_rule = {name!r}: {rule}: a resumed run may differ if results depend on it. "
        f"{hint}"
    ]


def require_loss(config: Config, loss: Loss) -> None:
    """Call each function of a loss, and compare what it says of itself with its derivatives.

    Raises:
        PluginError: a function fails, or does not return a loss for each sample, or an attribute
            is not true.
    """
    real = torch.tensor(_REAL, dtype=torch.float64, requires_grad=True)
    fake = torch.tensor(_FAKE, dtype=torch.float64, requires_grad=True)

    def refuse(rule: str, hint: str = "") -> NoReturn:
        raise PluginError("game.loss", rule, value=config.game.loss, hint=hint)

    def value(name: str, *logits: Tensor) -> Tensor:
        function = loss
        for part in name.split("."):
            function = getattr(function, part)
        with user_code("game.loss", f"its {name} fails", value=config.game.loss):
            found = function(*logits)  # type: ignore[operator]
        expected = f"its {name} must return a value for each sample, floating-point ({len(real)},)"
        if not isinstance(found, Tensor):
            refuse(f"{expected}; found {type(found).__name__}")
        if found.shape != real.shape or not found.is_floating_point():
            kind = dtype_name(found.dtype)
            refuse(f"{expected}; found {kind} {tuple(found.shape)}")
        if not found.isfinite().all():
            refuse(f"{expected}; found values that are not finite")
        return found

    def slope(name: str, output: Tensor, logits: Tensor) -> Tensor:
        if not output.requires_grad:
            refuse(f"its {name} does not depend on the logits, or was detached from them")
        with user_code("game.loss", f"its {name} has no derivative", value=config.game.loss):
            (found,) = torch.autograd.grad(
                output.sum(), logits, allow_unused=True, materialize_grads=True, retain_graph=True
            )
        return found

    if isinstance(loss.discriminator, Sum):
        value("discriminator.real", real), value("discriminator.fake", fake)
    of_discriminator = slope("discriminator", value("discriminator", real, fake), fake)
    generator = value("generator", real, fake)
    of_generator = slope("generator", generator, fake)
    if not of_generator.any():
        refuse("its generator does not depend on the logits of fakes")
    if not loss.generator_reads_real and not torch.equal(
        generator, value("generator", -real, fake)
    ):
        refuse("its generator depends on the real logits", "Set generator_reads_real=True")
    if loss.zero_sum and not torch.allclose(of_generator, -of_discriminator):
        refuse("zero_sum is True, but its derivatives do not cancel", "Set zero_sum=False")
    if loss.ratio is not None:
        found, expected = value("ratio", real, fake).detach(), of_generator / of_discriminator
        wrong = expected.isfinite() & ~torch.isclose(found, expected, rtol=1e-6)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            refuse(
                f"its ratio must be the generator's derivative over the discriminator's by the "
                f"fake logit; at {_FAKE[i]} expected {float(expected[i]):.4g}, found "
                f"{float(found[i]):.4g}",
                "Correct it, or leave it out",
            )


def _require_second_order(config: Config, rule: SecondOrder, batch: Batch) -> None:
    try:
        rule.require_second_derivatives(batch)
    except RuntimeError as error:
        raise ConfigError(
            "game.update_rule",
            f"needs second derivatives, which a network does not have: {described(error)}",
            value=config.game.update_rule,
            hint="Use a first-order rule such as 'extragradient', or another network",
        ) from error


def _require_penalty(rule: UpdateRule, scheduled: ScheduledPenalty, batch: Batch) -> None:
    player = scheduled.penalty.player
    try:
        loss, _ = rule.game.penalty_loss(batch, [scheduled])
        torch.autograd.backward(loss)
    except Exception as error:
        raise ConfigError(
            f"game.penalties.{scheduled.name}",
            f"needs the {player} to be differentiable twice, down to its input, "
            "and it is not (token ids, or a layer without second derivatives?): "
            f"{described(error)}",
            hint="Leave the penalty out, or use another network",
        ) from error
    network = getattr(rule.game, player)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and rule.game.autocast is None:
            if not parameter.grad.isfinite().all():
                raise ConfigError(
                    f"game.penalties.{scheduled.name}",
                    f"its gradient by the {player}'s parameter {name!r} is not finite",
                    hint="Add a small number below square roots and norms of the network",
                )
            parameter.grad = None
