"""Check the header of a sample's file against the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import read_npy
from gatdist.data.codecs.audio import read_audio, read_audio_header
from gatdist.data.codecs.images import read_image_header, read_image_shape
from gatdist.data.codecs.text import decode_text_into


def sample_shape(
    content: bytes, modality: str, common: Mapping[str, Any], *, whole: bool = False
) -> tuple[int, ...]:
    """Return the shape of one sample, as in :class:`~gatdist.data.format.manifest.SampleSpec`.

    Args:
        content: of its file.
        modality: expected; CodecError if it is another.
        common: expected ``sample_rate``, ``channels``, ``sample_shape`` and ``num_tokens``, if any.
        whole: decode audio to its end, which is slow; else only its container is checked.
    """
    if not content:
        raise CodecError("is empty")
    if whole and modality == "audio":
        read_audio(content)
    return _PROBES[modality](content, common)


def image_remarks(content: bytes) -> list[str]:
    """Return the kinds of :data:`~gatdist.packing.outcome.REMARKS` on an image, by its header."""
    header = read_image_header(content)
    found = {
        "transparent": header.has_alpha,
        header.profile: bool(header.profile),
        "reduced": header.bits == 16,
        "animated": header.is_animated,
    }
    return [name for name, applies in found.items() if applies]


def _image(content: bytes, common: Mapping[str, Any]) -> tuple[int, ...]:
    return read_image_shape(content)


def _audio(content: bytes, common: Mapping[str, Any]) -> tuple[int, ...]:
    header = read_audio_header(content)
    rate, channels = common.get("sample_rate"), common.get("channels")
    if rate and header.sample_rate != rate:
        raise CodecError(f"has {header.sample_rate:,} Hz, others {rate:,}")
    if channels and header.channels not in (1, channels):
        raise CodecError(f"has {header.channels} channels, others {channels}")
    if not header.length:
        raise CodecError("has no samples")
    return channels or header.channels, header.length


def _text(content: bytes, common: Mapping[str, Any]) -> tuple[int, ...]:
    decode_text_into(content, np.empty(len(content), dtype=np.uint8))
    return (len(content),)


def _points(content: bytes, common: Mapping[str, Any]) -> tuple[int, ...]:
    array = read_npy(content)
    expected = common.get("sample_shape")
    if array.dtype.kind not in "fiu" or not array.shape or 0 in array.shape:
        raise CodecError(f"is {array.dtype} of shape {array.shape}, expected numbers")
    if expected and array.shape != tuple(expected):
        raise CodecError(f"has shape {array.shape}, others {tuple(expected)}")
    return array.shape


def _tokens(content: bytes, common: Mapping[str, Any]) -> tuple[int, ...]:
    ids = read_npy(content)
    num_tokens = common["num_tokens"]
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or not ids.size:
        raise CodecError(f"is {ids.dtype} of shape {ids.shape}, expected a row of whole numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= num_tokens:
        raise CodecError(f"has tokens {ids.min()} to {ids.max()}, expected 0 to {num_tokens - 1}")
    return (len(ids),)


_PROBES: Mapping[str, Callable[[bytes, Mapping[str, Any]], tuple[int, ...]]] = {
    "image": _image,
    "audio": _audio,
    "text": _text,
    "points": _points,
    "tokens": _tokens,
}
