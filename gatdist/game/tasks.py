"""Tasks: what the generator receives of a sample, and what the discriminator sees of it.

A sample is a record of named fields, each a tensor whose first axis is the samples of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.common.registry import Registry, call_with_options
from gatdist.config import Config
from gatdist.models import build_networks
from gatdist.models.spectrograms import LogMelSpectrogram
from gatdist.parallel import draws

Fields = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """Random numbers of a task, a function of the samples' positions in the run."""

    seed: int
    suffix: str
    positions: Tensor

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw [n, *shape] in (0, 1)."""
        return draws.uniform(self.seed, f"task/{name}{self.suffix}", self.positions, shape)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw standard normal [n, *shape]."""
        return draws.normal(self.seed, f"task/{name}{self.suffix}", self.positions, shape)

    def integers(self, name: str, high: int) -> Tensor:
        """Draw int64 [n] in [0, high)."""
        return draws.integers(self.seed, f"task/{name}{self.suffix}", self.positions, high)


class Task:
    """The defaults of all tasks; a subclass overrides what differs.

    Attributes:
        target: Field that the generator makes; the data's samples are of this field.
        takes_latents: Whether latents are the generator's first argument.
    """

    target: ClassVar[str] = "sample"
    takes_latents: ClassVar[bool] = False

    def __init__(self) -> None:
        pass  # options are keywords

    def prepare(self, fields: Fields, drawn: Draws | None) -> Fields:
        """Return the fields that are used, computed from those of the data, on their device.

        ``drawn`` is for random crops and the like in training; None outside of it.
        """
        return fields

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        """Return the generator's arguments before the labels, without latents, [n, …] each."""
        return ()

    def shown(self, fields: Fields) -> Tensor:
        """Return the discriminator's input, [n, …]. The field ``target`` is real or generated."""
        return fields[self.target]


@dataclass(frozen=True)
class Shapes:
    """Shapes of one sample in a task.

    Attributes:
        target: Of what the generator makes.
        inputs: Of the generator's inputs besides latents.
        shown: Of the discriminator's input.
    """

    target: Shape
    inputs: tuple[Shape, ...]
    shown: Shape

    @classmethod
    def of(cls, task: Task, sample_shape: Shape, fields: Mapping[str, Shape]) -> Shapes:
        """Find the shapes out with tensors without values.

        Args:
            task: Of the run.
            sample_shape: Of the data's samples.
            fields: Shapes of their further fields.

        Raises:
            ConfigError: The data lacks a field.
        """
        shapes = {task.target: sample_shape, **fields}
        data = {name: torch.empty(1, *shape, device="meta") for name, shape in shapes.items()}
        drawn = Draws(0, "", torch.zeros(1, dtype=torch.int64, device="meta"))
        try:
            found = task.prepare(data, drawn)
            inputs, shown = task.inputs(found), task.shown(found)
        except KeyError as error:
            rule = f"needs the field {error}, and the data has {', '.join(map(repr, shapes))}"
            hint = "Choose other data, or another task"
            raise ConfigError("game.task", rule, value=type(task).__name__, hint=hint) from None
        return cls(
            tuple(found[task.target].shape[1:]),
            tuple(tuple(each.shape[1:]) for each in inputs),
            tuple(shown.shape[1:]),
        )


tasks: Registry[type[Task]] = Registry("game.task")


def build_networks_of(
    config: Config,
    task: Task,
    sample_shape: Shape,
    num_classes: int,
    metadata: Mapping[str, Any],
) -> tuple[nn.Module, nn.Module]:
    """Build the configured networks for a task; see :func:`gatdist.models.build_networks`."""
    shapes = Shapes.of(task, sample_shape, metadata.get("fields", {}))
    return build_networks(
        config,
        shapes.target,
        num_classes,
        metadata,
        inputs=shapes.inputs,
        shown=shapes.shown,
        takes_latents=task.takes_latents,
    )


def build_task(config: Config, metadata: Mapping[str, Any]) -> Task:
    """Build the task that ``game.task`` names; it gets what it takes of the samples' metadata."""
    kind = tasks[config.game.task.name]
    known = inspect.signature(kind).parameters
    given = {name: value for name, value in metadata.items() if name in known}
    return call_with_options(kind, config.game.task.options, "game.task", **given)


@tasks.register("generation")
class Generation(Task):
    """Latents → samples (Goodfellow et al. 2014)."""

    takes_latents = True


@tasks.register("translation")
class Translation(Task):
    """Images ``input`` → images ``target``; the discriminator sees both (Isola et al. 2017)."""

    target = "target"

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        return (fields["input"],)

    def shown(self, fields: Fields) -> Tensor:
        return torch.cat([fields["input"], fields["target"]], 1)


@tasks.register("vocoder")
class Vocoder(Task):
    """Log-mel spectrogram ``mel`` → audio ``wave``, from audio alone (Kong et al. 2020).

    ``crop`` samples at a random place of each clip are shown, a multiple of ``hop``. The others are
    options of :class:`~gatdist.models.spectrograms.LogMelSpectrogram`; ``highest`` in hertz.
    """

    target = "wave"

    def __init__(
        self,
        *,
        sample_rate: int,
        crop: PositiveInt = 8192,
        bands: PositiveInt = 80,
        window: PositiveInt = 1024,
        hop: PositiveInt = 256,
        highest: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        if crop % hop:
            hint = f"Use {max(1, round(crop / hop)) * hop}"
            raise ConfigError(
                "game.task.crop", f"must be a multiple of the hop, {hop}", value=crop, hint=hint
            )
        self.crop = crop
        self.mel = LogMelSpectrogram(
            sample_rate, bands=bands, window=window, hop=hop, highest=highest
        )

    def prepare(self, fields: Fields, drawn: Draws | None) -> Fields:
        wave = fields["wave"]
        if drawn is None:
            wave = wave[:, :, : wave.shape[2] // self.mel.hop * self.mel.hop]
        else:
            wave = cropped(wave, self.crop, drawn, "game.task.crop")
        return {"wave": wave, "mel": self.mel(wave)}

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        return (fields["mel"],)


def cropped(clips: Tensor, size: int, drawn: Draws, key: str) -> Tensor:
    """Return a window of each clip [n, c, t], at a random place, [n, c, size]."""
    spare = clips.shape[2] - size
    if spare < 0:
        rule = f"must be at most {clips.shape[2]:,}, the length of the clips"
        raise ConfigError(key, rule, value=size)
    if not spare:
        return clips
    starts = drawn.integers("crop", spare + 1)
    places = starts[:, None] + torch.arange(size, device=clips.device)
    return clips.gather(2, places[:, None].expand(-1, clips.shape[1], -1))
