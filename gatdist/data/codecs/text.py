"""Texts: ``.txt`` files in UTF-8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.errors import CodecError

TEXT_COMPONENT = "txt"
# Of a vocabulary: ids have 8 bits, and 0 is the end.
MOST_CHARACTERS = 255

Ids = NDArray[np.uint8]


class Vocabulary:
    """What the ids of a text stand for. Id 0 is behind its end.

    Args:
        characters: those that texts may hold, each once, at most 255: id i is the i-th of them.
            None: the ids are the bytes of UTF-8, so that every text has some.
    """

    def __init__(self, characters: str | None = None) -> None:
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters or "", start=1)}

    def __len__(self) -> int:
        """Number of ids, that of the end among them."""
        return 256 if self.characters is None else 1 + len(self.characters)

    def encode(self, text: str, length: int | None = None) -> Ids:
        """The ids of a text.

        Args:
            text: without the character 0.
            length: ids to give. A longer text is cut behind the last whole character that fits, a
                shorter one is followed by 0. None: as many as it has.

        Returns:
            uint8 [length].

        Raises:
            CodecError: the text is empty, or holds a character that is not known.
        """
        if not text:
            raise CodecError("is empty", hint="Take it out and pack again")
        if self.characters is None:
            found = self._bytes(text, length)
        else:
            text = text[:length]
            found = bytes(self._id(c, at) for at, c in enumerate(text))
        ids = np.zeros(len(found) if length is None else length, dtype=np.uint8)
        ids[: len(found)] = np.frombuffer(found, dtype=np.uint8)
        return ids

    def decode(self, ids: Ids) -> str:
        """The text of ids uint8 [n], up to its end.

        Bytes that are no UTF-8 become the character U+FFFD.
        """
        known = ids.tobytes().partition(b"\0")[0]
        if self.characters is None:
            return known.decode(errors="replace")
        return "".join(self.characters[i - 1] for i in known)

    def _bytes(self, text: str, length: int | None) -> bytes:
        data = text.encode()
        if 0 in data:
            raise CodecError(
                f"holds the character 0 at byte {data.index(0)}", hint="Take it out and pack again"
            )
        if length is None or len(data) <= length:
            return data
        # Of the character that is cut, only the beginning is there: what that holds is dropped.
        return data[:length].decode(errors="ignore").encode()

    def _id(self, character: str, at: int) -> int:
        if character not in self._ids:
            raise CodecError(
                f"holds {character!r} at {at}, which is not in data.vocabulary",
                hint="Add it there, or leave data.vocabulary out: then texts are read as bytes",
            )
        return self._ids[character]


def decode_text(content: bytes | memoryview, length: int) -> Ids:
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


def decode_text_into(
    content: bytes | memoryview, out: Ids, vocabulary: Vocabulary | None = None
) -> None:
    """Decode a text into ``out``, uint8 [length]. See :func:`decode_text`.

    Args:
        content: a whole file.
        out: for the ids.
        vocabulary: what ids stand for; None for bytes.
    """
    data = bytes(content)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CodecError(
            f"is not UTF-8 (byte {data[error.start]:#04x} at {error.start})",
            hint="Convert it to UTF-8 and pack again",
        ) from None
    out[...] = (vocabulary or Vocabulary()).encode(text, len(out))
