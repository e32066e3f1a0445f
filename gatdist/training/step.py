"""One training step: the phases of the update rule, each with its optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatdist.common.numerics import kernels, tf32
from gatdist.common.seeding import seed_all
from gatdist.config import Config, PlayerName
from gatdist.game import Observations, Phase, Step, UpdateRule
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.nn import shared_casts
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.training.copies import Copies
from gatdist.training.health import all_finite
from gatdist.training.player import ema_weight
from gatdist.training.state import TrainState

if TYPE_CHECKING:  # a machine that only benchmarks steps has no fsspec
    from gatdist.data.loader import Batch as LoadedBatch
    from gatdist.data.sample_format import SampleFormat


@dataclass
class StepMetrics:
    """What a step measured.

    Attributes:
        observed: tags and values of any shape, to report.
        tracked: by phase, means over the global batch that adaptive state is updated from.
    """

    observed: list[tuple[str, Tensor]] = field(default_factory=list)
    tracked: list[Observations] = field(default_factory=list)


# Times a part of the step, by name.
Timer = Callable[[str], AbstractContextManager[object]]
# :func:`run_phases`, or CUDA graphs of it.
RunPhases = Callable[[TrainState, UpdateRule, Step, Config, Timer], StepMetrics]


@contextmanager
def as_configured(config: Config) -> Iterator[None]:
    """Compute with the kernels and the rounding that the configuration requests."""
    deterministic, compiled = config.run.reduction == "canonical", bool(config.precision.compile)
    with tf32(config.precision.tf32), kernels(deterministic=deterministic, compiled=compiled):
        yield


def to_device(
    loaded: LoadedBatch,
    sample_format: SampleFormat,
    config: Config,
    copies: Copies,
    *,
    step: int,
    noise: int,
) -> Batch:
    """Copy this worker's share of a step's samples to the device, without waiting for it.

    ``noise`` is the number of the noise stream.
    """
    copied = copies(loaded)
    samples, positions = copied.samples, copied.positions
    real, inputs = sample_format.to_network(samples), sample_format.inputs(samples)
    suffix = f"#{noise}" if noise else ""
    if config.data.x_flip:
        mirrored = draws.integers(config.run.seed, f"x_flip{suffix}", positions, 2) == 1
        mirrored = mirrored[:, None, None, None]
        real = torch.where(mirrored, real.flip(3), real)
        for name in [
            n for n, field in inputs.items() if sample_format.fields[n].modality == "image"
        ]:
            inputs[name] = torch.where(mirrored, inputs[name].flip(3), inputs[name])
    if config.data.dequantize:
        stream = f"dequantization{suffix}"
        drawn = draws.uniform(config.run.seed, stream, positions, real.shape[1:], real.dtype)
        real += sample_format.level * (drawn - 0.5)
    dtype = DTYPES[config.precision.dtype]

    def laid_out(field: Tensor) -> Tensor:
        images = config.precision.channels_last and field.dim() == 4
        layout = torch.channels_last if images else torch.contiguous_format
        return field.to(dtype).contiguous(memory_format=layout)

    return Batch(
        real=laid_out(real),
        inputs={name: laid_out(field) for name, field in inputs.items()},
        labels=copied.labels if config.model.conditional else None,
        positions=positions,
        step=step,
        total=config.step_samples,
        noise=noise,
        host_positions=None if positions is loaded.positions else loaded.positions,
    )


def train_step(
    state: TrainState,
    rule: UpdateRule,
    batch: Batch,
    config: Config,
    statistics: Statistics,
    timer: PhaseTimer,
    graphs: RunPhases | None = None,
) -> None:
    """Make one step: run the rule's phases, update what is adaptive, count the samples.

    ``batch`` is this worker's share of the step's samples. ``statistics`` receives losses, logits,
    penalties and gradient norms. ``graphs`` runs the phases instead of :func:`run_phases`.
    """
    # What a network draws without having done so at the start follows from the seed and the step.
    seed_all(config.run.seed, f"step/{state.reduction.comm.rank}#{batch.noise}", batch.step)
    step = Step(
        rule.game.prepare(batch),
        {
            name: player.hyperparameters(state.samples_seen)
            for name, player in state.players.items()
        },
        ema_weight(config.game.ema_half_life_samples.at(state.samples_seen), config.step_samples),
    )
    if rule.game.augmentation is not None:
        rule.game.augmentation.follow(state.samples_seen)
    metrics = (graphs or run_phases)(state, rule, step, config, timer)
    with timer("optimizer"):
        _update_adaptive_states(rule, metrics.tracked, batch.step, config.run.global_batch)
    for tag, values in metrics.observed:
        statistics.add(tag, values)
    state.samples_seen += config.step_samples


def run_phases(
    state: TrainState, rule: UpdateRule, step: Step, config: Config, timer: Timer
) -> StepMetrics:
    """Run the phases one after another, then update the generator's moving average.

    Whether gradients are good is decided after their reduction, from numbers that are identical on
    every rank: either all workers make the optimizer step of a phase, or none does. With
    ``health.atomic`` one bad phase undoes the whole step.
    """
    metrics = StepMetrics()
    scaler = state.scaler
    undo = _Undo(state) if config.health.atomic else None
    for phase in rule.all_phases(step):
        players = {name: state.players[name] for name in phase.players}
        with timer(phase.name), shared_casts():  # forward, backward, average over the workers
            for player in players.values():
                player.zero_grad()
            for forwards in rule.game.forwards.values():
                forwards.begin()
            parts = _parts(state, phase, config)
            # Means of what is observed are not those of scaled losses.
            scaled = [part.scaled(scaler.scale) for part in parts] if scaler else parts
            observations = phase.gradients(rule.game, state.reduction, scaled)
        with timer("optimizer"):
            unscale = 1 / scaler.scale if scaler else None
            norms = {name: player.gradient_norm(unscale) for name, player in players.items()}
            # 1 if all norms are finite and none is a spike, else 0. It stays on the device.
            ok = state.guard(norms, scaler.may_overflow if scaler else None)
            if undo:
                undo.before(phase.players, ok)
            for forwards in rule.game.forwards.values():
                forwards.settle(state.reduction, parts, ok)
            metrics.tracked.append(_tracked(state, rule, parts, observations))
            # Below, no worker waits for another: only a phase that follows can be interrupted.
            state.before_optimizers(phase)
            for name, player in players.items():
                origin = (phase.origin or {}).get(name)
                player.step(ok, norms[name], step.optim[name], origin)
            if scaler:
                scaler.update(all_finite(norms))
        metrics.observed += [(f"gradient_norm/{name}", norm) for name, norm in norms.items()]
        metrics.observed += [pair for part in observations for pair in part.items()]
    with timer("optimizer"):
        if undo:
            undo.unless_all_ok()
        state.average.update(state.players["generator"].bare, step.ema_weight)
    return metrics


def _parts(state: TrainState, phase: Phase, config: Config) -> list[Batch]:
    """Split the phase's batch into micro-batches or virtual workers."""
    sizes = [getattr(config.optim, name).micro_batch for name in phase.players]
    micro_batch = min((size for size in sizes if size is not None), default=None)
    return state.reduction.split(phase.batch, micro_batch)


def _tracked(
    state: TrainState, rule: UpdateRule, parts: list[Batch], observations: list[Observations]
) -> Observations:
    """Return means over the global batch of the tracked metrics, by tag."""
    tags = sorted(rule.tracked_metrics & observations[0].keys())
    if not tags:
        return {}
    means = state.reduction.mean(
        [part.mean(observed[tag]) for tag in tags]
        for part, observed in zip(parts, observations, strict=True)
    )
    return dict(zip(tags, means, strict=True))


def _update_adaptive_states(
    rule: UpdateRule, phases: list[Observations], step: int, num_samples: int
) -> None:
    """Update adaptive state once a step, from means over its phases."""
    if not any(phases):
        return
    for adaptive_state in rule.adaptive_states.values():
        values = {tag: [p[tag] for p in phases if tag in p] for tag in adaptive_state.tags}
        means = {tag: torch.stack(found).mean() for tag, found in values.items() if found}
        if means:
            adaptive_state.update(means, step, num_samples)


class _Undo:
    """Restore what a step's phases have changed if any of them was not good."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        # Forwards change those of both networks in every phase.
        buffers = [b for player in state.players.values() for b in player.bare.buffers()]
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._saved: dict[PlayerName, list[Tensor]] = {}
        self._all_ok: Tensor | None = None

    def before(self, players: tuple[PlayerName, ...], ok: Tensor) -> None:
        """Save players before their optimizer step; ``ok`` says whether they make it."""
        for name in players:
            if name not in self._saved:
                tensors = self._state.players[name].changed_by_step()
                self._saved[name] = [t.clone() for t in tensors]
        self._all_ok = ok if self._all_ok is None else self._all_ok * ok

    @torch.no_grad()
    def unless_all_ok(self) -> None:
        assert self._all_ok is not None
        pairs = list(self._buffers)
        for name, saved in self._saved.items():
            pairs += zip(self._state.players[name].changed_by_step(), saved, strict=True)
        for now, before in pairs:
            now.copy_(now.where(self._all_ok > 0, before))
