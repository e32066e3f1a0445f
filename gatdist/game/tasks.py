"""Tasks: what the generator receives of a sample, and what the discriminator sees of it.

A sample is a record of named fields, each a tensor whose first axis is the samples of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from gatdist.common.errors import ConfigError, MissingFieldError
from gatdist.common.registry import Registry
from gatdist.models.spectrograms import LogMelSpectrogram
from gatdist.parallel import draws

Fields = Mapping[str, Tensor]
Shape = tuple[int, ...]
Decibels = Annotated[float, Field(ge=-60, le=60)]
_IMAGES = 4  # axes
_SHOWN = 10  # names of fields in a message


class Record(dict[str, Tensor]):
    """Fields of samples. A missing one is a ConfigError, unlike other KeyErrors of users' code."""

    def __missing__(self, name: str) -> Tensor:
        known = ", ".join(map(repr, [*self][:_SHOWN])) + ", …" * (len(self) > _SHOWN)
        rule = f"needs the field {name!r}, and there is only {known or 'none'}"
        hint = "Check its name, or choose other data or another task"
        raise MissingFieldError("game.task", rule, hint=hint)


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


def shapes_of_data(
    task: Task, sample_shape: Shape, metadata: Mapping[str, Any]
) -> dict[str, Shape]:
    """Return the shapes of the data's fields by name, that of the generated one first."""
    return {task.target: sample_shape, **metadata.get("fields", {})}


def taken_by(
    kind: type[Any], available: Mapping[str, Any], options: Mapping[str, Any], subject: str
) -> dict[str, Any]:
    """Return what the constructor of a task or term takes of what is available.

    Raises ConfigError if it takes a sample rate and there is none.
    """
    known = inspect.signature(kind).parameters
    rate = known.get("sample_rate")
    is_needed = rate is not None and rate.default is rate.empty
    if is_needed and "sample_rate" not in {*available, *options}:
        hint = "Choose another one, or data of audio"
        raise ConfigError(subject, "needs audio, and the data set has none", hint=hint)
    return {name: value for name, value in available.items() if name in known}


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
    """Images ``input`` → images ``target``; the discriminator sees both (Isola et al. 2017).

    In training, a square of ``crop`` pixels at a random place of both images is used, if it is
    given, and half of the pairs are flipped with ``flip``. Else it is the center.
    """

    target = "target"

    def __init__(self, *, crop: PositiveInt | None = None, flip: bool = False) -> None:
        self.crop, self.flip = crop, flip

    def prepare(self, fields: Fields, drawn: Draws) -> Fields:
        images: Sequence[Tensor] = (fields["input"], fields["target"])
        sizes = [list(each.shape[2:]) for each in images]
        if sizes[0] != sizes[1] or any(each.dim() != _IMAGES for each in images):
            found = " and ".join(str(list(each.shape[1:])) for each in images)
            rule = f"needs images of equal size in the fields 'input' and 'target'; found {found}"
            raise ConfigError("game.task", rule, value="translation", hint="Set data.resolution")
        if self.crop is not None:
            images = cropped(images, (self.crop, self.crop), drawn, "game.task.crop")
        if self.flip and drawn.is_training:
            flipped = (drawn.uniform("flip") < 0.5)[:, None, None, None]
            images = [torch.where(flipped, each.flip(3), each) for each in images]
        return dict(zip(("input", "target"), images, strict=True))

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        return (fields["input"],)

    def shown(self, fields: Fields) -> Tensor:
        return torch.cat([fields["input"], fields["target"]], 1)


@tasks.register("vocoder")
class Vocoder(Task):
    """Log-mel spectrogram ``mel`` → audio ``wave``, from audio alone (Kong et al. 2020).

    In training, ``crop`` samples at a random place of each clip are shown, a multiple of ``hop``,
    amplified by a random level in ``gain``, lowest and highest in decibels, so that the generator
    learns recordings of other levels (Siuzdak 2023 trains with peaks of −6 to −1 dB). The others
    are options of :class:`~gatdist.models.spectrograms.LogMelSpectrogram`; ``highest`` in hertz.
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
        gain: Annotated[list[Decibels], Field(min_length=2, max_length=2)] | None = None,
    ) -> None:
        if gain and gain[0] > gain[1]:
            rule = "must be the lowest and the highest gain, in this order"
            raise ConfigError("game.task.gain", rule, value=gain)
        if crop % hop:
            hint = f"Use {max(1, round(crop / hop)) * hop}"
            raise ConfigError(
                "game.task.crop", f"must be a multiple of the hop, {hop}", value=crop, hint=hint
            )
        if (window - hop) % 2:  # the spectrogram would lack a frame
            rule = f"must be even or odd like the hop, {hop}"
            raise ConfigError("game.task.window", rule, value=window)
        self.crop, self.gain = crop, gain
        self.mel = LogMelSpectrogram(
            sample_rate, bands=bands, window=window, hop=hop, highest=highest
        )

    @property
    def parameters(self) -> dict[str, Any]:
        return {"mel": self.mel.parameters}

    def prepare(self, fields: Fields, drawn: Draws) -> Fields:
        wave = fields["wave"]
        if drawn.is_training:
            (wave,) = cropped([wave], (self.crop,), drawn, "game.task.crop")
            if self.gain:
                low, high = self.gain
                decibels = low + (high - low) * drawn.uniform("gain")
                wave = wave * (10 ** (decibels / 20)).to(wave.dtype)[:, None, None]
        else:
            wave = wave[:, :, : wave.shape[2] // self.mel.hop * self.mel.hop]
        return {"wave": wave, "mel": self.mel(wave)}

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        return (fields["mel"],)


def cropped(
    fields: Sequence[Tensor], size: Shape, drawn: Draws, subject: str = "game.task"
) -> list[Tensor]:
    """Return the same window of each field [n, c, …], of ``size`` along the axes after the second.

    At a random place of each sample in training, else in the center.

    Args:
        fields: Of equal size.
        size: Of the window.
        drawn: Of these samples.
        subject: Configuration key of the size, for messages.

    Raises:
        ConfigError: The fields are smaller, or differ in size.
    """
    whole = tuple(fields[0].shape[2:])
    if any(tuple(field.shape[2:]) != whole for field in fields):
        sizes = ", ".join(str(list(field.shape[2:])) for field in fields)
        raise ConfigError(subject, f"needs fields of equal size; found {sizes}")
    if len(size) != len(whole) or any(a < b for a, b in zip(whole, size, strict=True)):
        rule = f"must be at most the size of the samples, {list(whole)}"
        raise ConfigError(subject, rule, value=list(size))
    found = list(fields)
    for axis, (length, wanted) in enumerate(zip(whole, size, strict=True), 2):
        spare = length - wanted
        if not drawn.is_training:
            found = [field.narrow(axis, spare // 2, wanted) for field in found]
        elif spare:
            starts = drawn.integers(f"crop/{axis - 2}", spare + 1)
            places = starts[:, None] + torch.arange(wanted, device=starts.device)
            found = [_gathered(field, axis, places) for field in found]
    return found


def _gathered(field: Tensor, axis: int, places: Tensor) -> Tensor:
    """Return the entries at ``places`` [n, k] of each sample along an axis."""
    shape = [1] * field.dim()
    shape[0], shape[axis] = places.shape
    sizes = [*field.shape]
    sizes[axis] = places.shape[1]
    return field.gather(axis, places.view(shape).expand(sizes))
