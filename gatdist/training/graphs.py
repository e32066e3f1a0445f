"""CUDA graphs of a step's phases: captured once, replayed at every step.

A graph holds addresses of tensors and plain numbers. Whatever differs from step to step is copied
to the addresses that it reads: fields, labels, positions (which key all random numbers), and
scheduled values. Steps with different penalties are different graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.config import Config
from gatdist.game import Step, UpdateRule
from gatdist.parallel.recording import Recorder
from gatdist.training.state import TrainState
from gatdist.training.step import StepMetrics, Timer, run_phases

# Steps of a kind before its capture, in which libraries choose their kernels.
WARM_UP_STEPS = 3


class StepGraphs:
    """Run phases as :func:`run_phases` does, from graphs.

    Args:
        recorder: captures them.
        lengthy: context in which they are captured.
    """

    def __init__(
        self,
        recorder: Recorder,
        lengthy: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._lengthy = lengthy
        self._recorder = recorder
        self._inputs: _Inputs | None = None
        self._variant: Hashable = None
        self._steps: dict[tuple[str, ...], int] = {}
        self._recordings: dict[tuple[str, ...], _Recording] = {}

    def __call__(
        self,
        state: TrainState,
        rule: UpdateRule,
        step: Step,
        config: Config,
        timer: Timer,
    ) -> StepMetrics:
        """Run the phases; ``timer`` times all of them together, as ``phases``.

        Raises:
            ConfigError: the step does what can't be captured.
        """
        batch = step.batch
        variant = (batch.noise, rule.variant)
        if variant != self._variant:
            self._variant = variant
            self._steps.clear()
            self._recordings.clear()
        kind = tuple(p.name for p in rule.game.penalties if p.due(batch.step))
        if self._inputs is None:
            self._inputs = _Inputs(rule, step, config)
        here = self._inputs.filled(step)

        def play() -> StepMetrics:
            return run_phases(state, rule, here, config, _untimed)

        with timer("phases"):
            self._steps[kind] = self._steps.get(kind, 0) + 1
            if self._steps[kind] <= WARM_UP_STEPS:
                return self._recorder.warm_up(play)
            if kind not in self._recordings:
                with self._lengthy():
                    self._recordings[kind] = self._record(play)
            return self._recordings[kind].replayed()

    def clear(self) -> None:
        """Forget all graphs: batches may have another size from now on."""
        self._inputs = None
        self._steps.clear()
        self._recordings.clear()

    def _record(self, play: Callable[[], StepMetrics]) -> _Recording:
        def played() -> tuple[StepMetrics, Tensor]:
            metrics = play()
            return metrics, torch.cat([v.detach().flatten() for _, v in metrics.observed])

        try:
            (metrics, values), replay = self._recorder.record(played)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                "precision.cuda_graphs",
                f"a network, loss or penalty of this run does in a step what can't be recorded: "
                f"{str(error).strip().splitlines()[0]}",
                value=True,
                hint="Leave it out",
            ) from error
        return _Recording(replay, metrics, values)


@dataclass
class _Recording:
    """One kind of step.

    Attributes:
        replay: computes it.
        metrics: tensors that each replay overwrites.
        values: all observed values, concatenated; likewise.
    """

    replay: Callable[[], None]
    metrics: StepMetrics
    values: Tensor

    def replayed(self) -> StepMetrics:
        """Replay, and return what it measured; observed values outlast the next replay."""
        self.replay()
        values = self.values.clone().split([v.numel() for _, v in self.metrics.observed])
        tags = [tag for tag, _ in self.metrics.observed]
        return StepMetrics(list(zip(tags, values, strict=True)), self.metrics.tracked)


class _Inputs:
    """The addresses of what differs from step to step."""

    def __init__(self, rule: UpdateRule, step: Step, config: Config) -> None:
        batch = step.batch
        self._step_samples = config.step_samples
        self._schedules = rule.game.schedules
        self._scheduled = {name: _Number(batch.real) for name in self._schedules}
        self._rates = {name: _Number(batch.real) for name in step.optim}
        constant = config.game.ema_half_life_samples.is_constant
        self._ema_weight = None if constant else _Number(batch.real)
        self._batch = replace(
            batch,
            real=batch.real.clone(),
            labels=None if batch.labels is None else batch.labels.clone(),
            positions=batch.positions.clone(),
            scheduled={name: number.tensor for name, number in self._scheduled.items()},
            inputs={name: field.clone() for name, field in batch.inputs.items()},
        )

    def filled(self, step: Step) -> Step:
        """Copy ``step`` to the tensors that graphs read."""
        batch, mine = step.batch, self._batch
        mine.real.copy_(batch.real, non_blocking=True)
        mine.positions.copy_(batch.positions, non_blocking=True)
        if mine.labels is not None and batch.labels is not None:
            mine.labels.copy_(batch.labels, non_blocking=True)
        for name, field in mine.inputs.items():
            field.copy_(batch.inputs[name], non_blocking=True)
        for name, schedule in self._schedules.items():
            self._scheduled[name].set(schedule(batch.step * self._step_samples))
        for name, settings in step.optim.items():
            self._rates[name].set(float(settings.learning_rate))
        optim = {
            name: replace(settings, learning_rate=self._rates[name].tensor)
            for name, settings in step.optim.items()
        }
        ema_weight = step.ema_weight
        if self._ema_weight:
            self._ema_weight.set(float(ema_weight))
            ema_weight = self._ema_weight.tensor
        return Step(replace(mine, step=batch.step, noise=batch.noise), optim, ema_weight)


class _Number:
    """A float32 scalar on the device."""

    def __init__(self, like: Tensor) -> None:
        self.tensor = torch.zeros((), device=like.device)
        self._value = 0.0

    def set(self, value: float) -> None:
        if value != self._value:
            self._value = value
            self.tensor.fill_(value)  # no copy from the host, which would wait


def _untimed(name: str) -> AbstractContextManager[object]:
    return nullcontext()
