"""Decoders that return a new array."""

from __future__ import annotations

from typing import Any

import numpy as np

from gatdist.data.codecs.arrays import decode_tokens_into
from gatdist.data.codecs.audio import decode_audio_into
from gatdist.data.codecs.images import decode_image_into
from gatdist.data.codecs.text import decode_text_into


def decode_image(
    content: bytes | memoryview, shape: tuple[int, ...], resize: str | None = None
) -> np.ndarray[Any, Any]:
    """Return uint8 [H, W, C] for a shape (C, H, W)."""
    pixels = np.empty((*shape[1:], shape[0]), dtype=np.uint8)
    decode_image_into(content, pixels, resize)
    return pixels


def decode_audio(
    content: bytes | memoryview, shape: tuple[int, ...], sample_rate: int
) -> np.ndarray[Any, Any]:
    clip = np.empty(shape, dtype=np.float32)
    decode_audio_into(content, clip, sample_rate)
    return clip


def decode_text(content: bytes | memoryview, length: int) -> np.ndarray[Any, Any]:
    text = np.empty(length, dtype=np.uint8)
    decode_text_into(content, text)
    return text


def decode_tokens(
    content: bytes | memoryview, length: int, num_tokens: int
) -> np.ndarray[Any, Any]:
    tokens = np.empty(length, dtype=np.int32)
    decode_tokens_into(content, tokens, num_tokens)
    return tokens
