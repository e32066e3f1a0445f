"""The training step: a loop over the phases that the update rule yields."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gatdist.common.seeding import seed_all
from gatdist.config import Config, PlayerName
from gatdist.game import Observations, Phase, Step, UpdateRule
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.training.guard import all_finite
from gatdist.training.state import TrainState


@dataclass
class Seen:
    """What a step observed.

    Attributes:
        observed: what to report: tags and values, of any shape.
        tracked_metrics: means over the global batch that adaptive state is updated from, by phase.
    """

    observed: list[tuple[str, Tensor]] = field(default_factory=list)
    tracked_metrics: list[Observations] = field(default_factory=list)


# Gets the time of each phase, by name.
Timer = Callable[[str], AbstractContextManager[object]]
# What plays the phases of a step: :func:`play_phases`, or a recording of it.
PlaysPhases = Callable[[TrainState, UpdateRule, Step, Config, Timer], Seen]


def train_step(
    state: TrainState,
    rule: UpdateRule,
    batch: Batch,
    config: Config,
    statistics: Statistics,
    timer: PhaseTimer,
    play: PlaysPhases | None = None,
) -> None:
    """One step of the game: its phases; then the game learns from what they saw.

    Args:
        state: is changed in place; its clock advances by the step's samples.
        rule: yields the phases.
        batch: this worker's share of the step's samples.
        config: of the run.
        statistics: gets losses, logits, penalties and gradient norms.
        timer: gets the time of each phase.
        play: plays the phases; None: :func:`play_phases`.
    """
    total_samples = config.run.total_samples
    # What a network draws without having done so at the start follows from the seed and the step.
    stream = f"step/{state.reduction.comm.rank}#{batch.noise}"
    seed_all(config.run.seed, stream, batch.step)
    rates = {n: p.rate(state.samples_seen, total_samples) for n, p in state.players.items()}
    seen = (play or play_phases)(state, rule, Step(batch, rates), config, timer)
    with timer("optimizer"):
        _update_adaptive_states(rule, seen.tracked_metrics, batch.step, config.run.global_batch)
    for tag, values in seen.observed:
        statistics.add(tag, values)
    state.samples_seen += config.step_samples


def play_phases(
    state: TrainState,
    rule: UpdateRule,
    step: Step,
    config: Config,
    timer: Timer,
) -> Seen:
    """The players' moves, and the generator's average.

    Each phase computes its players' gradients, which the workers average; whether they are good
    is decided after that, from numbers that are the same everywhere, so all workers move or none
    does. A phase moves all of its players or none of them; with ``health.atomic`` so does a step.

    Args:
        state: its players, average, guard and scaler are changed in place.
        rule: yields the phases.
        step: where they are taken.
        config: of the run.
        timer: gets the time of each phase.
    """
    seen = Seen()
    undo = _Undo(state) if config.health.atomic else None
    for phase in rule.all_phases(step):
        players = {name: state.players[name] for name in phase.players}
        with timer(phase.name):
            for player in players.values():
                player.zero()
            for forwards in rule.game.forwards.values():
                forwards.begin()
            parts, observations = _gradients(state, rule, phase, config)
        with timer("optimizer"):
            unscale = 1 / state.scaler.scale if state.scaler else None
            norms = {name: player.gradient_norm(unscale) for name, player in players.items()}
            ok = state.guard(norms, state.scaler.may_overflow if state.scaler else None)
            if undo:
                undo.before(phase.players, ok)
            for name, player in players.items():
                origin = (phase.origin or {}).get(name)
                player.move(ok, norms[name], step.learning_rates[name], origin)
            for forwards in rule.game.forwards.values():
                forwards.settle(state.reduction, parts, ok)
            if state.scaler:
                state.scaler.update(all_finite(norms))
            seen.tracked_metrics.append(_means(state, rule, parts, observations))
        seen.observed += [(f"gradient_norm/{name}", norm) for name, norm in norms.items()]
        seen.observed += [pair for part in observations for pair in part.items()]
    with timer("optimizer"):
        if undo:
            undo.unless_all_ok()
        state.average.update(state.players["generator"].bare, config.step_samples)
    return seen


def _gradients(
    state: TrainState, rule: UpdateRule, phase: Phase, config: Config
) -> tuple[list[Batch], list[Observations]]:
    """Leave the phase's gradients in ``.grad``; its parts, and what each of them observed."""
    sizes = [getattr(config.optim, name).micro_batch for name in phase.players]
    micro_batch = min((size for size in sizes if size is not None), default=None)
    parts = state.reduction.split(phase.batch, micro_batch)
    scaled = [part.scaled(state.scaler.scale) for part in parts] if state.scaler else parts
    return parts, phase.gradients(rule.game, state.reduction, scaled)


def _means(
    state: TrainState, rule: UpdateRule, parts: list[Batch], observations: list[Observations]
) -> Observations:
    """Means over the global batch of what the game wants to learn from, by tag."""
    tags = sorted(rule.tracked_metrics & observations[0].keys())
    if not tags:
        return {}
    means = state.reduction.mean(
        [part.mean(seen[tag]) for tag in tags]
        for part, seen in zip(parts, observations, strict=True)
    )
    return dict(zip(tags, means, strict=True))


def _update_adaptive_states(
    rule: UpdateRule, tracked_metrics: list[Observations], step: int, num_samples: int
) -> None:
    """Let the game's learners take note of a step, once, by the mean over its phases."""
    if not any(tracked_metrics):
        return
    for adaptive_state in rule.adaptive_states.values():
        seen = {
            tag: [
                tracked_metric[tag] for tracked_metric in tracked_metrics if tag in tracked_metric
            ]
            for tag in adaptive_state.tags
        }
        means = {tag: torch.stack(values).mean() for tag, values in seen.items() if values}
        if means:
            adaptive_state.update(means, step, num_samples)


class _Undo:
    """Takes back what a step's phases have moved if any of them was not good."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._saved: dict[PlayerName, list[Tensor]] = {}
        self._all_ok: Tensor | None = None

    def before(self, players: tuple[PlayerName, ...], ok: Tensor) -> None:
        """Called before players move, with whether they will."""
        for name in players:
            if name not in self._saved:
                self._saved[name] = [t.clone() for t in self._state.players[name].moving()]
        self._all_ok = ok if self._all_ok is None else self._all_ok * ok

    @torch.no_grad()
    def unless_all_ok(self) -> None:
        """Called once all have moved."""
        assert self._all_ok is not None
        for name, saved in self._saved.items():
            for now, before in zip(self._state.players[name].moving(), saved, strict=True):
                now.copy_(now.where(self._all_ok > 0, before))
