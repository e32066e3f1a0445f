"""Sounds and texts as they are packed: all of one length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import numpy as np

from gatdist.common.errors import DataError
from gatdist.data.codecs import (
    CodecError,
    decode_audio_into,
    decode_text_into,
    encode_wav,
    read_audio,
    read_audio_header,
)
from gatdist.data.codecs.containers import repaired
from gatdist.packing.converted import Converted
from gatdist.packing.recipe import Recipe


class Audio:
    """Resamples sounds, and cuts or pads them; those that fit stay as they are.

    What changes becomes WAV of 16 bits. Resampling is polyphase, with a Kaiser window of β = 5
    (``scipy.signal.resample_poly``). What is too long loses its end, what is too short gets silence
    there.

    Args:
        recipe: what is asked, with a sample rate.
        sample_shape: (C, n) of all sounds.
    """

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        assert recipe.sample_rate is not None
        self.recipe = recipe
        self.sample_rate = recipe.sample_rate
        self._channels, self._length = sample_shape

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        """For sounds like these; None where none of them is one.

        Raises:
            DataError: most of them have no length in common, and the recipe has none.
        """
        headers = []
        for content in contents:
            with suppress(CodecError):
                headers.append(read_audio_header(content))
        if not headers:
            return None
        rate = recipe.sample_rate or _commonest([header.sample_rate for header in headers])
        channels = _commonest([header.channels for header in headers])
        lengths = Counter(-(-header.length * rate // header.sample_rate) for header in headers)
        length, count = lengths.most_common(1)[0]
        if recipe.length is None and 2 * count <= len(headers):
            seconds = f"{min(lengths) / rate:.2f} to {max(lengths) / rate:.2f} seconds long"
            rule = f"the sounds differ in length: {len(headers)} are {seconds}, at {rate:,} Hz"
            raise DataError("--length", rule, hint="Make all of one length with --length SAMPLES")
        resolved = recipe.model_copy(update={"sample_rate": rate})
        return cls(resolved, (channels, recipe.length or length))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, n) of what is packed."""
        return self._channels, self._length

    def __call__(self, content: bytes) -> Converted:
        """Convert one file. Raises CodecError if it is no sound, or of other channels."""
        header = read_audio_header(content)
        if header[1:] == (self._channels, self._length, self.sample_rate):
            clip = np.empty(self.sample_shape, dtype=np.float32)
            decode_audio_into(content, clip, self.sample_rate)
            return Converted(header.component, repaired(content))
        if self._channels not in (1, header.channels) and header.channels != 1:
            raise CodecError(f"has {header.channels} channels, others {self._channels}")
        clip = read_audio(content)
        if self._channels == 1:
            clip = clip.mean(axis=0, keepdims=True)
        if header.sample_rate != self.sample_rate:
            from scipy.signal import resample_poly  # takes long to import

            factor = math.gcd(header.sample_rate, self.sample_rate)
            up, down = self.sample_rate // factor, header.sample_rate // factor
            # Samples that only affect what is cut off below are not resampled: a low rate would
            # unfold into gigabytes. The filter reaches 10 max(up, down) / up samples to each side.
            needed = math.ceil((self._length * down + 20 * max(up, down)) / up) + 1
            clip = resample_poly(clip[:, :needed], up, down, axis=1)
        found = clip.shape[1]
        packed = np.zeros((self._channels, self._length), dtype=np.float32)
        packed[:, :found] = clip[:, : self._length]
        remarks = {"upscaled": f"{found:,} samples"} if found < self._length else {}
        return Converted("wav", encode_wav(packed, self.sample_rate), remarks)


class Texts:
    """Takes texts as they are; they are cut to their length when they are read.

    Args:
        recipe: what is asked.
        sample_shape: (n,) bytes.
    """

    sample_rate = None

    def __init__(self, recipe: Recipe, sample_shape: Sequence[int]) -> None:
        self.recipe = recipe
        (self._length,) = sample_shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(n,) bytes that are read of each."""
        return (self._length,)

    @classmethod
    def like(cls, recipe: Recipe, contents: Sequence[bytes]) -> Self | None:
        """For texts like these; None where none of them is one.

        Raises:
            DataError: they differ in length, and the recipe has none.
        """
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
        """Check one file. Raises CodecError if it is no text."""
        decode_text_into(content, np.empty(self._length, dtype=np.uint8))
        return Converted("txt", content)


def _commonest(values: Sequence[int]) -> int:
    return Counter(values).most_common(1)[0][0]
