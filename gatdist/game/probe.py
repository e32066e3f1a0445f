"""Finds out with two samples whether a rule, its penalties and the networks go together."""

from __future__ import annotations

import torch

from gatdist.config import BOTH, Config
from gatdist.errors import ConfigError
from gatdist.game.updates.rule import Step, UpdateRule
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


def require_derivatives(
    config: Config, rule: UpdateRule, sample_shape: tuple[int, ...], num_classes: int
) -> None:
    """Run a step's penalties and second-order products once, on the CPU, without moving anything.

    Args:
        config: of the run.
        rule: between networks on the CPU; gradients are left in their parameters.
        sample_shape: of one sample.
        num_classes: of the data; 0 if unlabelled.

    Raises:
        ConfigError: a network has no derivative that the rule or a penalty needs.
    """
    batch = probe_batch(config, sample_shape, num_classes)
    reduction = FastReduction(LocalCommunicator(torch.device("cpu")))
    for scheduled in rule.game.penalties:
        if scheduled.penalty.differentiates:
            try:
                loss, _ = rule.game.penalty_loss(batch.consecutive(1)[0], [scheduled])
                torch.autograd.backward(loss)
            except RuntimeError as error:
                raise ConfigError(
                    f"game.penalties.{scheduled.name}",
                    f"needs the {scheduled.penalty.player} to be differentiable twice, down to its "
                    f"input, and it is not (token ids, or a layer without second derivatives?): "
                    f"{_first_line(error)}",
                    mend="Leave the penalty out, or use another network",
                ) from None
    if rule.second_order:
        step = Step(batch, {name: getattr(config.optim, name).learning_rate for name in BOTH})
        for phase in rule.phases(step):
            try:
                phase.gradients(rule.game, reduction, [phase.batch])
            except RuntimeError as error:
                raise ConfigError(
                    "game.update_rule",
                    "needs second derivatives, which a network does not have: "
                    f"{_first_line(error)}",
                    value=config.game.update_rule,
                    mend="Use a first-order rule such as 'extragradient', or another network",
                ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
