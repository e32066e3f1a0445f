"""What becomes of a file."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from gatdist.data.packing.recipe import Recipe


class Converted(NamedTuple):
    """A file as it is packed.

    Attributes:
        component: its extension.
        content: its bytes.
        enlarged: the size of what was smaller than asked, such as "9 × 7"; else "".
    """

    component: str
    content: bytes
    enlarged: str = ""


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
