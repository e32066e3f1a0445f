"""The training step: a loop over the phases that the update rule yields."""

from __future__ import annotations

import torch

from gatdist.config import Config
from gatdist.game import Batch, UpdateRule
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.training.player import learning_rate_factor
from gatdist.training.state import TrainState


def train_step(
    state: TrainState,
    rule: UpdateRule,
    batch: Batch,
    config: Config,
    statistics: Statistics,
    timer: PhaseTimer,
) -> None:
    """One step of the game.

    Each phase computes its players' gradients, which the workers average; whether they are finite
    is decided after that, from numbers that are the same everywhere, so all workers move or none
    does. A phase moves all of its players or none of them.

    Args:
        state: is changed in place; its clock advances by the global batch.
        rule: yields the phases.
        batch: this worker's share of the global batch.
        config: of the run.
        statistics: gets losses, logits, penalties and gradient norms.
        timer: gets the time of each phase.
    """
    rate_factor = learning_rate_factor(config.optim, state.samples_seen, config.run.total_samples)
    for phase in rule.phases(batch):
        players = {name: state.players[name] for name in phase.players}
        with timer(phase.name):
            for player in players.values():
                player.zero()
            observations = phase.backward()
        with timer("optimizer"):
            norms = {name: player.gradient_norm() for name, player in players.items()}
            finite = torch.stack(list(norms.values())).isfinite().all().float()
            for name, player in players.items():
                player.move(finite, norms[name], rate_factor)
            state.skipped += finite == 0
        for name, norm in norms.items():
            observations[f"gradient_norm/{name}"] = norm
        for tag, values in observations.items():
            statistics.add(tag, values)
    with timer("optimizer"):
        state.average.update(state.players["generator"].bare, config.run.global_batch)
    state.samples_seen += config.run.global_batch
