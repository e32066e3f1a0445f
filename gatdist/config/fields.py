"""What keys of the sections may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _of_64_bits(value: int) -> int:
    """Any that a tensor can hold."""
    if value >= 2**63:
        raise PydanticCustomError("too_large", "must be below 2**63")
    return value


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_of_64_bits)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_of_64_bits)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
TwoPositiveInts = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelow1 = Annotated[float, Field(ge=0, lt=1)]
PlayerName = Literal["generator", "discriminator"]
BOTH: tuple[PlayerName, PlayerName] = ("generator", "discriminator")


def _vocabulary(characters: str) -> str:
    if len(set(characters)) < len(characters):
        raise PydanticCustomError("vocabulary", "must hold each character once")
    if not 1 <= len(characters) <= 255 or "\0" in characters:
        raise PydanticCustomError(
            "vocabulary", "must hold 1 to 255 characters, the character 0 not among them"
        )
    return characters


Vocabulary = Annotated[str, AfterValidator(_vocabulary)]


class NamedConfig(BaseModel):
    """Something registered, by its ``name``, and its own options."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside ``name``."""
        return dict(self.model_extra or {})
