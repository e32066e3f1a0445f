"""The phases of a step from CUDA graphs: recorded once, replayed at every step.

What a recording holds can't change: addresses of tensors and plain numbers. So whatever differs
from step to step is copied to where the recording looks for it: samples, labels, positions (from
which it draws all noise), learning rates and strengths of penalties that change. Steps that
evaluate different penalties are different recordings.
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
from gatdist.training.step import Seen, Timer, play_phases

# Steps of a kind that are computed as they are, so that libraries have chosen their kernels.
WARM_UP_STEPS = 3


class StepGraphs:
    """Plays phases as :func:`play_phases` does, from recordings.

    Args:
        recorder: makes them.
        lengthy: the context in which they are made.
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
    ) -> Seen:
        """See :func:`play_phases`. ``timer`` gets the time of all phases, as ``phases``.

        Raises:
            ConfigError: the step does what can't be recorded.
        """
        batch = step.batch
        variant = (batch.noise, rule.variant)
        if variant != self._variant:
            self._variant = variant
            self._steps.clear()
            self._recordings.clear()
        kind = tuple(p.name for p in rule.game.penalties if p.due(batch.step))
        if self._inputs is None:
            self._inputs = _Inputs(rule, step)
        here = self._inputs.filled(step)

        def play() -> Seen:
            return play_phases(state, rule, here, config, _untimed)

        with timer("phases"):
            self._steps[kind] = self._steps.get(kind, 0) + 1
            if self._steps[kind] <= WARM_UP_STEPS:
                return self._recorder.warm_up(play)
            if kind not in self._recordings:
                with self._lengthy():
                    self._recordings[kind] = self._record(play)
            return self._recordings[kind].replayed()

    def _record(self, play: Callable[[], Seen]) -> _Recording:
        def played() -> tuple[Seen, Tensor]:
            seen = play()
            return seen, torch.cat([values.detach().flatten() for _, values in seen.observed])

        try:
            (seen, values), replay = self._recorder.record(played)
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
        sizes = [value.numel() for _, value in seen.observed]
        return _Recording(replay, seen, values, sizes)


@dataclass
class _Recording:
    """One kind of step.

    Attributes:
        replay: computes it.
        seen: what it observes, where each replay leaves it.
        values: all observed values, one after another; likewise.
        sizes: how many each has.
    """

    replay: Callable[[], None]
    seen: Seen
    values: Tensor
    sizes: list[int]

    def replayed(self) -> Seen:
        """What a replay observed, of which what is to report outlasts the next replay."""
        self.replay()
        values = self.values.clone().split(self.sizes)
        tags = [tag for tag, _ in self.seen.observed]
        return Seen(list(zip(tags, values, strict=True)), self.seen.tracked_metrics)


class _Inputs:
    """Where recordings look for what differs from step to step.

    Args:
        rule: that is played.
        step: whose batch has the shape of all.
    """

    def __init__(self, rule: UpdateRule, step: Step) -> None:
        batch = step.batch
        self._changing = [p for p in rule.game.penalties if p.final_strength is not None]
        self._strengths = {p.name: _Number(batch.real) for p in self._changing}
        self._rates = {name: _Number(batch.real) for name in step.learning_rates}
        self._batch = replace(
            batch,
            real=batch.real.clone(),
            labels=None if batch.labels is None else batch.labels.clone(),
            positions=batch.positions.clone(),
            strengths={name: number.tensor for name, number in self._strengths.items()},
        )

    def filled(self, step: Step) -> Step:
        """``step``, in the tensors that recordings know."""
        batch, mine = step.batch, self._batch
        mine.real.copy_(batch.real, non_blocking=True)
        mine.positions.copy_(batch.positions, non_blocking=True)
        if mine.labels is not None and batch.labels is not None:
            mine.labels.copy_(batch.labels, non_blocking=True)
        for penalty in self._changing:
            self._strengths[penalty.name].set(penalty.strength_at(batch.step))
        for name, rate in step.learning_rates.items():
            self._rates[name].set(float(rate))
        rates = {name: number.tensor for name, number in self._rates.items()}
        return Step(replace(mine, step=batch.step, noise=batch.noise), rates)


class _Number:
    """A float32 scalar on the device."""

    def __init__(self, like: Tensor) -> None:
        self.tensor = torch.zeros((), device=like.device)
        self._value = 0.0

    def set(self, value: float) -> None:
        """Without a copy from the host, for which it would have to wait."""
        if value != self._value:
            self._value = value
            self.tensor.fill_(value)


def _untimed(name: str) -> AbstractContextManager[object]:
    """Within a recording there is no clock."""
    return nullcontext()
