"""Finds out with two samples whether a rule, its penalties and the networks go together."""

from __future__ import annotations

import traceback

import torch

from gatdist.config import BOTH, Config
from gatdist.errors import ConfigError, GatdistError, TrainingError
from gatdist.game.penalties import ScheduledPenalty
from gatdist.game.updates.rule import Step, UpdateRule
from gatdist.game.updates.second_order import SecondOrder
from gatdist.models import DTYPES
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction

_NUM_SAMPLES = 2


def probe_batch(config: Config, sample_shape: tuple[int, ...], num_classes: int) -> Batch:
    """A step's batch of zeros with two samples for each discriminator step."""
    n = _NUM_SAMPLES * config.game.num_discriminator_steps
    return Batch(
        real=torch.zeros(n, *sample_shape, dtype=DTYPES[config.precision.dtype]),
        labels=torch.zeros(n, dtype=torch.int64) if num_classes else None,
        positions=torch.arange(n),
        step=0,  # every lazy penalty is due at step 0
    )


def require_playable(
    config: Config, rule: UpdateRule, sample_shape: tuple[int, ...], num_classes: int
) -> None:
    """Compute a step's gradients once, on the CPU, without moving anything.

    Args:
        config: of the run.
        rule: between networks on the CPU; gradients are left in their parameters.
        sample_shape: of one sample.
        num_classes: of the data; 0 if unlabelled.

    Raises:
        ConfigError: a network has no derivative that the rule or a penalty needs, or not one logit
            a sample.
        TrainingError: a network or loss fails; the place is named.
    """
    batch = probe_batch(config, sample_shape, num_classes)
    for scheduled in rule.game.penalties:
        if scheduled.penalty.differentiates:
            _require_penalty(rule, scheduled, batch.consecutive(1)[0])
    reduction = FastReduction(LocalCommunicator(torch.device("cpu")))
    rates = {name: getattr(config.optim, name).learning_rate for name in BOTH}
    if isinstance(rule, SecondOrder):
        try:
            rule.require_second_derivatives(batch)
        except RuntimeError as error:
            raise ConfigError(
                "game.update_rule",
                f"needs second derivatives, which a network does not have: {_first_line(error)}",
                value=config.game.update_rule,
                mend="Use a first-order rule such as 'extragradient', or another network",
            ) from None
    for phase in rule.phases(Step(batch, rates)):
        try:
            phase.gradients(rule.game, reduction, [phase.batch])
        except GatdistError:
            raise
        except Exception as error:  # somebody's network or loss
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingError(
                f"a step with two samples fails in {place.filename}:{place.lineno}: "
                f"{type(error).__name__}: {error}"
            ) from error


def _require_penalty(rule: UpdateRule, scheduled: ScheduledPenalty, batch: Batch) -> None:
    try:
        loss, _ = rule.game.penalty_loss(batch, [scheduled])
        torch.autograd.backward(loss)
    except RuntimeError as error:
        raise ConfigError(
            f"game.penalties.{scheduled.name}",
            f"needs the {scheduled.penalty.player} to be differentiable twice, down to its input, "
            "and it is not (token ids, or a layer without second derivatives?): "
            f"{_first_line(error)}",
            mend="Leave the penalty out, or use another network",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
