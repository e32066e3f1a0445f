"""What a sample of each kind is: its files, its array, and how the one becomes the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gatdist.data.codecs import (
    AUDIO_EXTENSIONS,
    IMAGE_COMPONENTS,
    POINT_COMPONENT,
    TEXT_COMPONENT,
    TOKENS_COMPONENT,
    Vocabulary,
    decode_audio_into,
    decode_image_into,
    decode_point_into,
    decode_text_into,
    decode_tokens_into,
)
from gatdist.data.format import SampleSpec

# Decodes a file into the array of a sample, or raises CodecError.
Decode = Callable[[bytes | memoryview, NDArray[Any]], None]


class ReadSpec(SampleSpec):
    """What samples are as they are read: all of one shape.

    Attributes:
        vocabulary: of texts: the characters that ids 1, 2 and so on stand for; None for bytes.
    """

    vocabulary: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of pictures, that of points, (C, n) of sounds, (n,) of texts and tokens."""
        return tuple(n for n in self.sample_shape if n is not None)


class Modality(NamedTuple):
    """A kind of samples.

    Attributes:
        noun: what one of them is called.
        components: endings of their files.
        dtype: of their arrays.
        decoder: makes the decoder, given what the samples are and how pictures are resized (the
            name of a filter, or None where they must have their size).
    """

    noun: str
    components: tuple[str, ...]
    dtype: DTypeLike
    decoder: Callable[[ReadSpec, str | None], Decode]


MODALITIES: Mapping[str, Modality] = {
    "image": Modality(
        "picture",
        IMAGE_COMPONENTS,
        np.uint8,
        lambda spec, resize: partial(decode_image_into, resize=resize),
    ),
    "points": Modality(
        "array", (POINT_COMPONENT,), np.float32, lambda spec, resize: decode_point_into
    ),
    "audio": Modality(
        "sound",
        AUDIO_EXTENSIONS,
        np.float32,
        lambda spec, resize: partial(decode_audio_into, sample_rate=spec.sample_rate or 0),
    ),
    "text": Modality(
        "text",
        (TEXT_COMPONENT,),
        np.uint8,
        lambda spec, resize: partial(decode_text_into, vocabulary=Vocabulary(spec.vocabulary)),
    ),
    "tokens": Modality(
        "sequence of tokens",
        (TOKENS_COMPONENT,),
        np.int32,
        lambda spec, resize: partial(decode_tokens_into, num_tokens=spec.num_tokens or 0),
    ),
}


def new_samples(spec: ReadSpec, count: int) -> NDArray[Any]:
    """Memory for decoded samples.

    Args:
        spec: what they are.
        count: how many.

    Returns:
        uint8 or, of 16 bits, uint16 [count, H, W, C] for images, [count, *sample_shape] for all
        else: float32 points and sounds, uint8 texts, int32 tokens.
    """
    shape, dtype = spec.shape, MODALITIES[spec.modality].dtype
    if spec.modality == "image":
        shape = (*shape[1:], shape[0])
        dtype = np.uint16 if spec.bits == 16 else dtype
    return np.empty((count, *shape), dtype=dtype)
