"""What becomes of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gatdist.packing.recipe import Recipe

# What a report counts, each with an example: what was smaller or shorter than asked (with its
# size), composited on the background, converted from another color profile, taken for sRGB because
# its profile is damaged, reduced from 16 to 8 bits (with the levels), of more images than one.
REMARKS = ("upscaled", "transparent", "profiles", "damaged_profiles", "reduced", "animated")


class Converted(NamedTuple):
    """A file as it is packed.

    Attributes:
        component: its extension.
        content: its bytes.
        remarks: what was done that a user may want to know, with details; see ``REMARKS``.
    """

    component: str
    content: bytes
    remarks: Mapping[str, str] = {}


class Converter(Protocol):
    """Turns a file of a source into one of the data set."""

    @property
    def recipe(self) -> Recipe:
        """What is asked, and what else all samples must have in common."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what is packed, as in the manifest."""

    @property
    def sample_rate(self) -> int | None:
        """Of sounds, in hertz."""

    def __call__(self, content: bytes) -> Converted:
        """Convert one file. Raises CodecError if it is not what it should be."""


def counted(found: Sequence[Mapping[str, tuple[int, str]]]) -> dict[str, Any]:
    """Of each of ``REMARKS``, how many samples and the first, from counts of several tasks."""
    message: dict[str, Any] = {}
    for kind in REMARKS:
        those = [remarks[kind] for remarks in found if kind in remarks]
        message |= {
            kind: sum(count for count, _ in those),
            f"{kind}_example": those[0][1] if those else "",
        }
    return message
