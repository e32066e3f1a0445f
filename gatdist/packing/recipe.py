"""What is done to each sample, as the user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gatdist.common.errors import ConfigError
from gatdist.common.registry import validation_problem

DEFAULT_SHARD_BYTES = 256_000_000


def _hexadecimal(color: str) -> str:
    """An opaque color as ``#rrggbb``."""
    try:
        found: tuple[int, ...] = ImageColor.getrgb(color)
    except ValueError:
        found = ()
    if len(found) != 3:
        raise ValueError("must be a name such as white, or #rrggbb")
    return "#{:02x}{:02x}{:02x}".format(*found)


class Recipe(BaseModel):
    """What is done to each sample, and how many go into a shard. Names as on the command line.

    Attributes:
        size: (height, width) of the pictures; None leaves them as they are.
        transform: how a picture comes to that size, None being ``center-crop``; see
            :mod:`~gatdist.packing.images`.
        filter: of the resizing.
        format: of the pictures that must change; ``keep`` leaves the others as they are.
        quality: of JPEG and WebP, 1 to 100.
        color: ``auto`` is gray where all pictures are, else RGB.
        background: what transparent images are composited on: a name or ``#rrggbb``.
        bits: of each channel, 8 or 16; 16 is stored as PNG.
        length: samples of a sound, which is cut or padded with silence; bytes of a text.
        sample_rate: of sounds, in hertz; others are resampled. None: that of most.
        shard_bytes: what a shard should have, about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    transform: (
        Literal["center-crop", "center-crop-wide", "center-crop-dhariwal", "stretch"] | None
    ) = None
    filter: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] | None = None
    format: Literal["keep", "png", "jpeg", "webp"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    color: Literal["auto", "rgb", "gray"] = "auto"
    background: Annotated[str, AfterValidator(_hexadecimal)] = "#ffffff"
    bits: Literal[8, 16] = 8
    length: Annotated[int, Field(gt=0)] | None = None
    sample_rate: Annotated[int, Field(gt=0)] | None = None
    shard_bytes: Annotated[int, Field(gt=0)] = DEFAULT_SHARD_BYTES

    @property
    def background_color(self) -> tuple[int, int, int]:
        """Red, green and blue of the background, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        # Not by what was set: another process gets all fields, those at their default, too.
        chosen = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if self.size is None:
            for name in chosen & {"transform", "filter"}:
                raise _refused(name, "needs --size", getattr(self, name))
        elif self.transform == "center-crop-wide" and self.size[1] <= self.size[0]:
            raise _refused("size", "must be wider than high for center-crop-wide", self.size)
        elif self.transform == "center-crop-dhariwal":
            if self.size[0] != self.size[1]:
                raise _refused("size", "must be a square for center-crop-dhariwal", self.size)
            if "filter" in chosen:
                raise _refused("filter", "center-crop-dhariwal has its own", self.filter)
        if self.bits == 16 and self.format not in ("keep", "png"):
            raise _refused("bits", f"{self.format} has 8; needs --format keep or png", self.bits)
        if "quality" in chosen and self.format not in ("jpeg", "webp"):
            raise _refused("quality", "needs --format jpeg or webp", self.quality)
        return self


def read_recipe(given: Mapping[str, Any]) -> Recipe:
    """A recipe of these fields; those that are None are at their default.

    Raises:
        ConfigError: a field is out of range or does not go with another.
    """
    try:
        return Recipe(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        key, rule, value = validation_problem(error)
        option = key.partition(".")[0].replace("_", "-")
        raise ConfigError(f"--{option}", rule, value=value) from None


def _refused(option: str, rule: str, value: object) -> ConfigError:
    shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
    return ConfigError(f"--{option}", rule, value=shown)
