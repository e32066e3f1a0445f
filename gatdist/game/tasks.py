"""Tasks: what the generator receives of a sample, and what the discriminator sees of it.

A sample is a record of named fields, each a tensor whose first axis is the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.common.registry import Registry
from gatdist.models.spectrograms import LogMelSpectrogram
from gatdist.parallel import draws

Fields = Mapping[str, Tensor]
Shape = tuple[int, ...]
_IMAGES = 4  # axes


class Record(dict[str, Tensor]):
    """Fields of samples. A missing one is a ConfigError, unlike other KeyErrors of users' code."""

    def __missing__(self, name: str) -> Tensor:
        rule = f"needs the field {name!r}, and there is only {', '.join(map(repr, self)) or 'none'}"
        raise ConfigError("game.task", rule, hint="Choose other data, or another task")


@dataclass(frozen=True)
class Draws:
    """Random numbers of a task, a function of the samples' positions in the run.

    Attributes:
        positions: int64 [n]; numbers of the samples outside of training.
        is_training: Whether fields are for a training step, not for an evaluation or a preview.
    """

    seed: int
    suffix: str
    positions: Tensor
    is_training: bool = True

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

    @property
    def parameters(self) -> dict[str, Any]:
        """How fields are computed from others, as JSON values by field, for other programs."""
        return {}

    def prepare(self, fields: Fields, drawn: Draws) -> Fields:
        """Return the fields that are used, computed from those of the data, on their device.

        Random numbers come from ``drawn``. Random crops are for training only
        (``drawn.is_training``): evaluations and previews show whole samples.
        """
        return fields

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        """Return the generator's arguments before the labels, without latents, [n, …] each."""
        return ()

    @property
    def has_inputs(self) -> bool:
        """Whether the generator has inputs from the data."""
        return type(self).inputs is not Task.inputs

    def shown(self, fields: Fields) -> Tensor:
        """Return the discriminator's input, [n, …]. The field ``target`` is real or generated."""
        return fields[self.target]

    def preview(self, real: Fields, fake: Fields) -> Fields:
        """Return what previews show of samples side by side, by title, [n, …] each.

        By default the fields of the target's kind, ``output`` and ``target``.

        Args:
            real: Fields of the samples.
            fake: The same with the generated field in place of the target.
        """
        target = real[self.target]
        others = {k: v for k, v in real.items() if k != self.target and _is_alike(v, target)}
        return {**others, "output": fake[self.target], "target": target}


def _is_alike(field: Tensor, target: Tensor) -> bool:
    """Return whether both are images, or have the same shape."""
    if target.ndim == _IMAGES:
        return field.ndim == _IMAGES and field.shape[1] in (1, 3)
    return field.shape == target.shape


tasks: Registry[type[Task]] = Registry("game.task")


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Register a subclass of :class:`Task`, for ``game.task``."""
    return tasks.register(name)


def is_built_in(task: Task) -> bool:
    """Return whether a task comes with gatdist."""
    return type(task).__module__ == __name__


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

    @property
    def parameters(self) -> dict[str, Any]:
        return {"mel": self.mel.parameters}

    def prepare(self, fields: Fields, drawn: Draws) -> Fields:
        wave = fields["wave"]
        if drawn.is_training:
            wave = cropped(wave, self.crop, drawn, "game.task.crop")
        else:
            wave = wave[:, :, : wave.shape[2] // self.mel.hop * self.mel.hop]
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
