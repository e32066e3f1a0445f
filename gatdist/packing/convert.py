"""Turns the files of a source into those of a data set, all alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

import numpy as np

from gatdist.common.errors import DataError
from gatdist.data.codecs import (
    FILTERS,
    CodecError,
    ImageHeader,
    decode_pixels,
    decode_point_into,
    read_image_header,
    read_npy,
)
from gatdist.data.codecs.levels import is_gray
from gatdist.packing import images
from gatdist.packing.converted import Converted, Converter
from gatdist.packing.images import FORMATS, STORED, TRANSFORMS
from gatdist.packing.recipe import Recipe
from gatdist.packing.sequences import Audio, Texts

# What makes the pixels of a file other than those that any reader would see.
_CHANGING = {"transparent", "profiles", "reduced", "animated"}


class Images:
    """Crops, resizes and stores pictures as the recipe says; those that fit stay as they are.

    Args:
        recipe: what is asked.
        sample_shape: (C, H, W) of all pictures, C being 1 or 3.
    """

    sample_rate = None

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        self.recipe = recipe
        self._channels, *size = sample_shape
        self._size = recipe.size or (size[0], size[1])
        self._transform = TRANSFORMS[recipe.transform or "center-crop"]
        self._filter = FILTERS[recipe.filter or "lanczos"]
        self._component = FORMATS[recipe.format]

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        """For pictures like these; None where none of them is one.

        Raises:
            DataError: most of them have no size in common, and the recipe has none.
        """
        headers = []
        for content in contents:
            with suppress(CodecError):
                headers.append(read_image_header(content))
        if not headers:
            return None
        if recipe.color == "auto":
            shows = not is_gray(recipe.background_color)
            channels = 1 if all(h.is_gray and not (h.has_alpha and shows) for h in headers) else 3
        else:
            channels = {"gray": 1, "rgb": 3}[recipe.color]
        sizes = Counter((header.height, header.width) for header in headers)
        size, count = sizes.most_common(1)[0]
        if recipe.size is None and 2 * count <= len(headers):
            most = ", ".join(f"{n} of {h} × {w}" for (h, w), n in sizes.most_common(3))
            rule = f"the pictures differ in height × width: among {len(headers)} are {most}"
            raise DataError("--size", rule, hint="Make all of one size with --size HxW")
        return cls(recipe, (channels, *(recipe.size or size)))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what is packed."""
        height, width = self._size
        is_wide = self.recipe.size and self.recipe.transform == "center-crop-wide"
        return self._channels, width if is_wide else height, width

    def __call__(self, content: bytes) -> Converted:
        """Convert one file. Raises CodecError if it is no picture, or of another size."""
        header = read_image_header(content)
        height, width = self._size
        if self.recipe.size is None and (header.height, header.width) != self._size:
            raise CodecError(
                f"is {header.height} × {header.width}, others {height} × {width} (height × width)",
                hint="Make all of one size with --size HxW",
            )
        pixels, remarks = decode_pixels(
            content,
            self._channels,
            bits=self.recipe.bits,
            background=self.recipe.background_color,
            header=header,
        )
        remarks = {**remarks, **({"animated": ""} if header.is_animated else {})}
        if self._stays(header) and not remarks.keys() & _CHANGING:
            return Converted(STORED[header.format], content, remarks)
        if self.recipe.size is not None:
            pixels = self._transform(pixels, height, width, self._filter)
        component = self._component or "png"
        packed = images.encode(pixels, component, self.recipe.quality)
        if header.height < height or header.width < width:
            remarks["upscaled"] = f"{header.height} × {header.width}"
        return Converted(component, packed, remarks)

    def _stays(self, header: ImageHeader) -> bool:
        component = STORED.get(header.format)
        return (
            (header.height, header.width) == self._size
            and self.sample_shape[1:] == self._size  # no bars are added
            and header.orientation == 1
            and component is not None
            and self._component in (None, component)
        )


class Arrays:
    """Takes ``.npy`` files of one shape as they are.

    Args:
        recipe: what is asked.
        sample_shape: of all arrays.
    """

    sample_rate = None

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        self.recipe = recipe
        self.sample_shape = tuple(sample_shape)

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        """For arrays of the shape that most of these have; None where none of them is one."""
        shapes: Counter[tuple[int, ...]] = Counter()
        for content in contents:
            with suppress(CodecError):
                shapes[read_npy(content).shape] += 1
        return cls(recipe, shapes.most_common(1)[0][0]) if shapes else None

    def __call__(self, content: bytes) -> Converted:
        """Check one file. Raises CodecError if it is no array of numbers, or of another shape."""
        decode_point_into(content, np.empty(self.sample_shape, dtype=np.float32))
        return Converted("npy", content)


_CONVERTERS: Mapping[str, type[Images | Audio | Texts | Arrays]] = {
    "image": Images,
    "audio": Audio,
    "text": Texts,
    "array": Arrays,
}


def converter(modality: str, recipe: Recipe, sample_shape: Sequence[int]) -> Converter:
    """What makes samples of that shape."""
    return _CONVERTERS[modality](recipe, sample_shape)


def converter_like(modality: str, recipe: Recipe, contents: Sequence[bytes]) -> Converter | None:
    """What makes all samples like most of these; None where none of them can be used.

    Raises:
        DataError: they have too little in common.
    """
    return _CONVERTERS[modality].like(recipe, contents)
