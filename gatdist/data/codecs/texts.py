"""Texts: ``.txt`` files in UTF-8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.errors import CodecError

TEXT_COMPONENT = "txt"

Bytes = NDArray[np.uint8]


def decode_text(content: bytes | memoryview, length: int) -> Bytes:
    """Decode a text.

    Args:
        content: a whole file.
        length: bytes to give. A longer text is cut behind the last whole character that fits.

    Returns:
        uint8 [length]: the bytes of the text, and 0 behind its end.

    Raises:
        CodecError: it is not UTF-8, empty, or holds the character 0.
    """
    text = np.empty(length, dtype=np.uint8)
    decode_text_into(content, text)
    return text


def decode_text_into(content: bytes | memoryview, out: Bytes) -> None:
    """Decode a text into ``out``, uint8 [length]. See :func:`decode_text`."""
    data = bytes(content)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CodecError(
            f"is not UTF-8 (byte {data[error.start]:#04x} at {error.start})",
            mend="Convert it to UTF-8 and pack again",
        ) from None
    if not data:
        raise CodecError("is empty", mend="Take it out and pack again")
    if 0 in data:
        raise CodecError(
            f"holds the character 0 at byte {data.index(0)}", mend="Take it out and pack again"
        )
    if len(data) > len(out):
        # Of the character that is cut, only the beginning is there: what that holds is dropped.
        data = data[: len(out)].decode(errors="ignore").encode()
    out[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    out[len(data) :] = 0
