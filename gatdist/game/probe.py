"""A trial step with two samples: do the update rule, loss, penalties and networks fit together?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import described, user_code
from gatdist.config import BOTH, Config
from gatdist.game.exactness import warn_of_state
from gatdist.game.game import Game
from gatdist.game.hidden import changed, fingerprint
from gatdist.game.losses import Loss, Sum
from gatdist.game.penalties import ScheduledPenalty
from gatdist.game.terms import is_built_in
from gatdist.game.updates.rule import Hyperparameters, Phase, Step, UpdateRule
from gatdist.game.updates.second_order import SecondOrder
from gatdist.models import DTYPES
from gatdist.models.structure import dtype_name
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction

_NUM_SAMPLES = 2
# Logits at which losses are evaluated, away from the kinks of common ones.
_REAL, _FAKE = (0.7, -1.2, 0.2, 1.6), (-1.5, -0.4, 0.3, 2.1)
# Attributes of a rule that are not its own state.
_NOT_STATE = frozenset(
    {"game", "config", "notes", "tags", "tensors", "adaptive_states", "tracked_metrics"}
)


def probe_batch(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    device: torch.device | None = None,
    fields: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Batch:
    """Return a step's batch with two samples per discriminator step, uniform in (-1, 1).

    ``fields`` are shapes of further fields, by name.
    """
    n = _NUM_SAMPLES * config.game.num_discriminator_steps
    positions = torch.arange(n, device=device)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        values = draws.uniform(0, name, positions, shape, DTYPES[config.precision.dtype])
        return 2 * values - 1

    has_labels = num_classes and config.model.conditional
    return Batch(
        real=drawn("probe", sample_shape),
        inputs={name: drawn(f"probe/{name}", shape) for name, shape in fields.items()},
        labels=torch.zeros_like(positions) if has_labels else None,
        positions=positions,
        step=0,  # every lazy penalty is due at step 0
        total=n,
    )


def check_step(
    config: Config,
    rule: UpdateRule,
    sample_shape: tuple[int, ...],
    num_classes: int,
    fields: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[str]:
    """Compute one step's gradients, without optimizer steps, and return warnings.

    Overwrites ``.grad`` of the networks. ``num_classes`` is 0 for unlabelled data; ``fields`` are
    shapes of further fields, by name.

    Raises:
        ConfigError: A network lacks a derivative that the rule or a penalty needs.
        PluginError: A user's loss or update rule fails or breaks its contract.
    """
    device = next(rule.game.generator.parameters()).device
    batch = rule.game.prepare(probe_batch(config, sample_shape, num_classes, device, fields))
    _LossCheck(config.game.loss, rule.game.loss).run()
    _check_terms(config, rule.game, batch.consecutive(config.game.num_discriminator_steps)[0])
    for scheduled in rule.game.penalties:
        if scheduled.penalty.differentiates:
            _check_penalty(rule, scheduled, batch.consecutive(1)[0])
    if isinstance(rule, SecondOrder):
        _check_second_derivatives(config, rule, batch)
    states = []
    for _ in range(1 if type(rule).__module__.startswith("gatdist.") else 3):
        _check_phases(config, rule, batch)
        attributes = vars(rule).items()
        states.append(
            {key: fingerprint(value) for key, value in attributes if key not in _NOT_STATE}
        )
    changes = changed(states[0], states[-1])
    if not changes:
        return []
    change = f"a step changes the attribute {changes[0]!r}"
    hint = "Keep state that affects the result in tensors"
    return [warn_of_state(config, "game.update_rule", config.game.update_rule, change, hint)]


def _check_terms(config: Config, game: Game, batch: Batch) -> None:
    """Refuse terms without effect, and users' terms that are not what they must be."""
    if not game.terms:
        return
    with torch.no_grad():
        generated = game.generate(batch)
        real = game.real_scores(batch, game.discriminator)
    generated = {name: field.detach().requires_grad_() for name, field in generated.items()}
    fake = game.discriminate(game.shown(batch, generated), batch, "fake")
    context = game.context(batch, generated, fake, real)
    for weighted in game.terms:
        requested = config.game.terms[weighted.name]
        kind = requested.term or weighted.name
        subject, n = f"game.terms.{weighted.name}", len(batch)
        refusal = ConfigError if is_built_in(weighted.term) else PluginError
        expected = f"must return one finite floating-point value per sample, ({n},)"
        with user_code(subject, f"fails with {n} samples", value=kind):
            value, again = weighted.term(context), weighted.term(context)
        if not isinstance(value, Tensor):
            raise PluginError(subject, f"{expected}; found {type(value).__name__}", value=kind)
        if value.shape != (n,) or not value.is_floating_point():
            found = f"{dtype_name(value.dtype)} {tuple(value.shape)}"
            raise PluginError(subject, f"{expected}; found {found}", value=kind)
        if not value.isfinite().all():
            raise PluginError(subject, f"{expected}; found NaN or infinity", value=kind)
        if not torch.equal(value, again):
            rule = "has another value for the same samples in another call"
            raise PluginError(subject, rule, value=kind, hint="Do not draw random numbers")
        gradients: Sequence[Tensor | None] = ()
        if value.requires_grad:
            fields = list(generated.values())
            gradients = torch.autograd.grad(value[0], fields, allow_unused=True, retain_graph=True)
        found_gradients = [gradient for gradient in gradients if gradient is not None]
        if not found_gradients:
            does_not = "does not depend on the generated fields, or is detached from them"
            raise refusal(subject, does_not, value=kind)
        if any(gradient[1:].any() for gradient in found_gradients):
            depends = "the value of a sample depends on others of the batch"
            raise PluginError(subject, depends, value=kind)


def _check_phases(config: Config, rule: UpdateRule, batch: Batch) -> None:
    subject, name = "game.update_rule", config.game.update_rule

    def refuse(message: str) -> NoReturn:
        raise PluginError(subject, message, value=name)

    reduction = FastReduction(LocalCommunicator(batch.positions.device))
    optim = {p: Hyperparameters(getattr(config.optim, p).learning_rate.at(0)) for p in BOTH}
    with user_code(subject, f"a step with {_NUM_SAMPLES} samples fails", value=name):
        for phase in rule.all_phases(Step(batch, optim)):
            if not isinstance(phase, Phase):
                refuse(f"phases() must yield Phase; found {type(phase).__name__}")
            if not phase.players or not set(phase.players) <= set(BOTH):
                refuse(
                    f"the players of phase {phase.name!r} must be among {', '.join(BOTH)}; found "
                    f"{phase.players!r}"
                )
            for observations in phase.gradients(rule.game, reduction, [phase.batch]):
                for tag, value in observations.items():
                    if not isinstance(value, Tensor):
                        refuse(
                            f"observations of phase {phase.name!r} must be tensors; found "
                            f"{type(value).__name__} for {tag!r}"
                        )


class _LossCheck:
    """Calls each function of a loss and compares its attributes with its derivatives."""

    def __init__(self, name: str, loss: Loss) -> None:
        self._name, self._loss = name, loss
        self._real = torch.tensor(_REAL, dtype=torch.float64, requires_grad=True)
        self._fake = torch.tensor(_FAKE, dtype=torch.float64, requires_grad=True)

    def run(self) -> None:
        loss, real, fake = self._loss, self._real, self._fake
        if isinstance(loss.discriminator, Sum):
            self._value("discriminator.real", real)
            self._value("discriminator.fake", fake)
        of_discriminator = self._slope("discriminator", self._value("discriminator", real, fake))
        generator = self._value("generator", real, fake)
        of_generator = self._slope("generator", generator)
        if not of_generator.any():
            self._refuse("generator does not depend on the fake logits")
        if not loss.generator_reads_real and not torch.equal(
            generator, self._value("generator", -real, fake)
        ):
            self._refuse("generator depends on the real logits", "Set generator_reads_real=True")
        if loss.zero_sum and not torch.allclose(of_generator, -of_discriminator):
            self._refuse("zero_sum is True, but the derivatives do not cancel", "Set it to False")
        if loss.ratio is None:
            return
        found, expected = self._value("ratio", real, fake).detach(), of_generator / of_discriminator
        wrong = expected.isfinite() & ~torch.isclose(found, expected, rtol=1e-6)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            self._refuse(
                "ratio must be the generator's derivative over the discriminator's with respect to "
                f"the fake logit; expected {float(expected[i]):.4g} at {_FAKE[i]}, found "
                f"{float(found[i]):.4g}",
                "Correct it, or leave it out",
            )

    def _value(self, name: str, *logits: Tensor) -> Tensor:
        function = attrgetter(name)(self._loss)
        with user_code("game.loss", f"{name} fails", value=self._name):
            found = function(*logits)
        n = len(logits[0])
        expected = f"{name} must return one finite floating-point value per sample, ({n},)"
        if not isinstance(found, Tensor):
            self._refuse(f"{expected}; found {type(found).__name__}")
        if found.shape != (n,) or not found.is_floating_point():
            self._refuse(f"{expected}; found {dtype_name(found.dtype)} {tuple(found.shape)}")
        if not found.isfinite().all():
            self._refuse(f"{expected}; found non-finite values")
        return found

    def _slope(self, name: str, output: Tensor) -> Tensor:
        """The derivative by the fake logits."""
        if not output.requires_grad:
            self._refuse(f"{name} does not depend on the logits, or is detached from them")
        with user_code("game.loss", f"{name} has no derivative", value=self._name):
            (slope,) = torch.autograd.grad(
                output.sum(),
                self._fake,
                allow_unused=True,
                materialize_grads=True,
                retain_graph=True,
            )
        return slope

    def _refuse(self, rule: str, hint: str = "") -> NoReturn:
        raise PluginError("game.loss", rule, value=self._name, hint=hint)


def _check_second_derivatives(config: Config, rule: SecondOrder, batch: Batch) -> None:
    try:
        rule.require_second_derivatives(batch)
    except RuntimeError as error:
        raise ConfigError(
            "game.update_rule",
            f"needs second derivatives, which a network does not have ({described(error)})",
            value=config.game.update_rule,
            hint="Use a first-order rule such as 'extragradient', or another network",
        ) from error


def _check_penalty(rule: UpdateRule, scheduled: ScheduledPenalty, batch: Batch) -> None:
    subject, player = f"game.penalties.{scheduled.name}", scheduled.penalty.player
    try:
        loss, _ = rule.game.penalty_loss(batch, [scheduled])
        torch.autograd.backward(loss)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            subject,
            f"the {player} must be twice differentiable, down to its input ({described(error)})",
            hint="Leave the penalty out, or use a network without token ids and with second "
            "derivatives",
        ) from error
    for name, parameter in getattr(rule.game, player).named_parameters():
        if parameter.grad is not None and rule.game.autocast is None:
            if not parameter.grad.isfinite().all():
                raise ConfigError(
                    subject,
                    f"the gradient by the {player}'s parameter {name!r} is not finite",
                    hint="Add a small number below square roots and norms of the network",
                )
            parameter.grad = None
