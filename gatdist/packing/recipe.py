"""The recipe: how samples are converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from gatdist.common.errors import ConfigError

DEFAULT_SHARD_BYTES = 256_000_000


def _hexadecimal(color: str) -> str:
    try:
        found: tuple[int, ...] = ImageColor.getrgb(color)
    except ValueError:
        found = ()
    if len(found) != 3:
        raise ValueError("must be a name such as white, or #rrggbb")
    return "#{:02x}{:02x}{:02x}".format(*found)


class Recipe(BaseModel):
    """How samples are converted, and the size of shards; see :func:`gatdist.pack`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[PositiveInt, PositiveInt] | None = None  # height, width
    transform: (
        Literal["center-crop", "center-crop-wide", "center-crop-dhariwal", "stretch"] | None
    ) = None
    filter: Literal["lanczos", "bicubic", "hamming", "bilinear", "box"] | None = None
    format: Literal["keep", "png", "jpeg", "webp"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    color: Literal["auto", "rgb", "gray"] = "auto"
    background: Annotated[str, AfterValidator(_hexadecimal)] = "#ffffff"
    bits: Literal[8, 16] = 8
    length: PositiveInt | None = None  # samples of audio, bytes of a text
    sample_rate: PositiveInt | None = None
    clip_length: PositiveInt | None = None  # samples of a clip that recordings are cut into
    clip_overlap: NonNegativeInt = 0  # samples that two successive clips share, at least
    shard_bytes: PositiveInt = DEFAULT_SHARD_BYTES

    @property
    def background_color(self) -> tuple[int, int, int]:
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
        if self.clip_length is None:
            if self.clip_overlap:
                raise _refused("clip-overlap", "needs --clip-length", self.clip_overlap)
        elif self.clip_length <= self.clip_overlap:
            rule = f"must be greater than --clip-overlap ({self.clip_overlap:,})"
            raise _refused("clip-length", rule, self.clip_length)
        elif self.length is not None:
            raise _refused("length", "can't be used with --clip-length", self.length)
        if self.bits == 16 and self.format not in ("keep", "png"):
            raise _refused("bits", f"{self.format} has 8; needs --format keep or png", self.bits)
        if "quality" in chosen and self.format not in ("jpeg", "webp"):
            raise _refused("quality", "needs --format jpeg or webp", self.quality)
        return self


def read_recipe(given: Mapping[str, Any]) -> Recipe:
    """Return a recipe, without the fields that are None. ConfigError if a field is invalid."""
    try:
        return Recipe(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        rule = problem["msg"][0].lower() + problem["msg"][1:]
        option = str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}", rule, value=problem["input"]) from None


def _refused(option: str, rule: str, value: object) -> ConfigError:
    shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
    return ConfigError(f"--{option}", rule, value=shown)
