"""Convert the files of a source into those of a data set, all of one shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import decode_point_into, read_npy
from gatdist.data.codecs.audio import (
    Clip,
    decode_audio_into,
    encode_wav,
    open_recording,
    read_audio_header,
)
from gatdist.data.codecs.containers import repaired
from gatdist.data.codecs.images import FILTERS, ImageHeader, decode_pixels, read_image_header
from gatdist.data.codecs.text import decode_text_into
from gatdist.packing import images
from gatdist.packing.clips import clip_starts, window
from gatdist.packing.images import FORMATS, STORED, TRANSFORMS
from gatdist.packing.recipe import Recipe

# Remarks on files whose pixels other readers would decode differently.
_CHANGING = {"transparent", "profiles", "reduced", "animated"}

T = TypeVar("T")


class Converted(NamedTuple):
    """A file as it is packed: its extension, its bytes, and remarks with details by kind."""

    component: str
    content: bytes
    remarks: Mapping[str, str] = {}


class Converter(ABC):
    """Converts the files of one modality."""

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        self.recipe = recipe
        self.sample_shape = tuple(sample_shape)

    @classmethod
    @abstractmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        """Return a converter to what most of these have in common; None if none is usable.

        Raises DataError if they have too little in common.
        """

    @abstractmethod
    def __call__(self, content: bytes) -> Converted:
        """Convert one file. Raises CodecError if it is unreadable or does not fit."""

    def samples(self, content: bytes, span_s: Fraction | None) -> Iterator[Converted]:
        """Yield the samples that one file becomes: one, but for recordings; see :meth:`__call__`.

        ``span_s`` is how much of audio is used, in seconds.
        """
        del span_s
        yield self(content)

    def count(self, content: bytes) -> int:
        """Return how many samples one file becomes, from its header. Raises CodecError."""
        del content
        return 1


class Images(Converter):
    """Crops, resizes and encodes images; those that fit stay as they are. [C, H, W], C 1 or 3."""

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        self._channels, *size = sample_shape
        self._size = height, width = recipe.size or (size[0], size[1])
        self._transform = TRANSFORMS[recipe.transform or "center-crop"]
        self._filter = FILTERS[recipe.filter or "lanczos"]
        self._component = FORMATS[recipe.format]
        is_wide = recipe.size and recipe.transform == "center-crop-wide"
        super().__init__(recipe, (self._channels, width if is_wide else height, width))

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        headers = _readable(read_image_header, contents)
        if not headers:
            return None
        if recipe.color == "auto":
            shows = len(set(recipe.background_color)) > 1  # not gray
            channels = 1 if all(h.is_gray and not (h.has_alpha and shows) for h in headers) else 3
        else:
            channels = {"gray": 1, "rgb": 3}[recipe.color]
        sizes = Counter((header.height, header.width) for header in headers)
        size, count = sizes.most_common(1)[0]
        if recipe.size is None and 2 * count <= len(headers):
            most = ", ".join(f"{n} of {h} × {w}" for (h, w), n in sizes.most_common(3))
            rule = f"the images differ in height × width: among {len(headers)} are {most}"
            raise DataError("--size", rule, hint="Resize all with --size HxW")
        return cls(recipe, (channels, *(recipe.size or size)))

    def __call__(self, content: bytes) -> Converted:
        header = read_image_header(content)
        height, width = self._size
        if self.recipe.size is None and (header.height, header.width) != self._size:
            raise CodecError(
                f"is {header.height} × {header.width}, others {height} × {width} (height × width)",
                hint="Resize all with --size HxW",
            )
        pixels, found = decode_pixels(
            content,
            self._channels,
            bits=self.recipe.bits,
            background=self.recipe.background_color,
            header=header,
        )
        remarks = {**found, **({"animated": ""} if header.is_animated else {})}
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


class Audio(Converter):
    """Resamples audio, and cuts or pads it at the end; files that fit stay as they are. [C, n].

    With ``clip_length``, each file is cut into overlapping clips. What is changed becomes 16-bit
    WAV. The recipe has a sample rate.
    """

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        super().__init__(recipe, sample_shape)
        assert recipe.sample_rate is not None
        self._rate = recipe.sample_rate
        self._channels, self._length = sample_shape

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        headers = _readable(read_audio_header, contents)
        if not headers:
            return None
        rate = recipe.sample_rate or commonest([header.sample_rate for header in headers])
        channels = commonest([header.channels for header in headers])
        lengths = Counter(-(-header.length * rate // header.sample_rate) for header in headers)
        length, count = lengths.most_common(1)[0]
        requested = recipe.clip_length or recipe.length
        if requested is None and 2 * count <= len(headers):
            seconds = f"{min(lengths) / rate:.2f} to {max(lengths) / rate:.2f} seconds long"
            rule = f"the audio files differ in length: {len(headers)} are {seconds}, at {rate:,} Hz"
            hint = "Cut or pad all with --length SAMPLES, or cut clips with --clip-length SAMPLES"
            raise DataError("--length", rule, hint=hint)
        resolved = recipe.model_copy(update={"sample_rate": rate})
        return cls(resolved, (channels, requested or length))

    def __call__(self, content: bytes) -> Converted:
        header = read_audio_header(content)
        if header[1:] == (self._channels, self._length, self._rate):
            decode_audio_into(content, np.empty(self.sample_shape, dtype=np.float32), self._rate)
            return Converted(header.component, repaired(content))
        (clip,) = self._windows(content, [(0, self._length)])
        return self._encoded(clip)

    def samples(self, content: bytes, span_s: Fraction | None) -> Iterator[Converted]:
        if self.recipe.clip_length is None:
            yield self(content)
            return
        header = read_audio_header(content)
        span_s = Fraction(header.length, header.sample_rate) if span_s is None else span_s
        length = math.ceil(span_s * self._rate)
        if not length:
            raise CodecError("has no samples")
        starts = clip_starts(length, self._length, self.recipe.clip_overlap)
        windows = [(start, min(start + self._length, length)) for start in starts]
        yield from map(self._encoded, self._windows(content, windows))

    def count(self, content: bytes) -> int:
        if self.recipe.clip_length is None:
            return 1
        header = read_audio_header(content)
        length = math.ceil(Fraction(header.length, header.sample_rate) * self._rate)
        return len(clip_starts(length, self._length, self.recipe.clip_overlap))

    def _windows(self, content: bytes, windows: Iterable[tuple[int, int]]) -> Iterator[Clip]:
        """Decode, mix and resample windows: of the first sample, and the one after the last."""
        with open_recording(content) as recording:
            channels = recording.header.channels
            if self._channels not in (1, channels) and channels != 1:
                raise CodecError(f"has {channels} channels, others {self._channels}")
            for first, end in windows:
                yield window(recording, first, end, self._rate, mono=self._channels == 1)

    def _encoded(self, clip: Clip) -> Converted:
        found = clip.shape[1]
        packed = np.zeros((self._channels, self._length), dtype=np.float32)
        packed[:, :found] = clip
        remarks = {"upscaled": f"{found:,} samples"} if found < self._length else {}
        return Converted("wav", encode_wav(packed, self._rate), remarks)


class Texts(Converter):
    """Keeps texts as they are; reading cuts them to their length. [n] bytes."""

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        lengths = []
        for content in contents:
            with suppress(CodecError):
                decode_text_into(content, np.empty(len(content), dtype=np.uint8))
                lengths.append(len(content))
        if not lengths:
            return None
        if recipe.length is None and min(lengths) < max(lengths):
            rule = f"the texts differ in length: {len(lengths)} have {min(lengths):,} to "
            hint = "Choose one with --length BYTES: longer texts are cut when they are read"
            raise DataError("--length", f"{rule}{max(lengths):,} bytes", hint=hint)
        return cls(recipe, (recipe.length or lengths[0],))

    def __call__(self, content: bytes) -> Converted:
        decode_text_into(content, np.empty(self.sample_shape, dtype=np.uint8))
        return Converted("txt", content)


class Arrays(Converter):
    """Keeps ``.npy`` files of one shape as they are."""

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        arrays = _readable(read_npy, contents)
        return cls(recipe, commonest([array.shape for array in arrays])) if arrays else None

    def __call__(self, content: bytes) -> Converted:
        decode_point_into(content, np.empty(self.sample_shape, dtype=np.float32))
        return Converted("npy", content)


CONVERTERS: Mapping[str, type[Converter]] = {
    "image": Images,
    "audio": Audio,
    "text": Texts,
    "array": Arrays,
}


def commonest(values: Sequence[Any]) -> Any:
    """Return the commonest value; of several the first."""
    return Counter(values).most_common(1)[0][0]


def _readable(read: Callable[[bytes], T], contents: Sequence[bytes]) -> list[T]:
    found = []
    for content in contents:
        with suppress(CodecError):
            found.append(read(content))
    return found
