"""Text: ``.txt`` files in UTF-8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs import CodecError

Ids = NDArray[np.uint8]


class Vocabulary:
    """Ids of up to 255 distinct characters, from 1; or of bytes of UTF-8. Id 0 follows the end."""

    def __init__(self, characters: str | None = None) -> None:
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters or "", start=1)}

    def __len__(self) -> int:
        return 256 if self.characters is None else 1 + len(self.characters)

    def encode(self, text: str, length: int | None = None) -> Ids:
        """Return the ids of a text, uint8 [length]. Raises CodecError.

        With ``length``, longer text is cut after the last whole character that fits, and shorter
        text is padded with 0.
        """
        if not text:
            raise CodecError("is empty", hint="Remove it and pack again")
        if self.characters is not None:
            found = bytes(self._id(c, at) for at, c in enumerate(text[:length]))
        else:
            found = text.encode()
            if 0 in found:
                rule = f"holds the character 0 at byte {found.index(0)}"
                raise CodecError(rule, hint="Remove it and pack again")
            if length is not None and len(found) > length:  # drop a partial last character
                found = found[:length].decode(errors="ignore").encode()
        ids = np.zeros(len(found) if length is None else length, dtype=np.uint8)
        ids[: len(found)] = np.frombuffer(found, dtype=np.uint8)
        return ids

    def decode(self, ids: Ids) -> str:
        """Return the text of ids uint8 [n] up to its end. Invalid UTF-8 becomes U+FFFD."""
        known = ids.tobytes().partition(b"\0")[0]
        if self.characters is None:
            return known.decode(errors="replace")
        return "".join(self.characters[i - 1] for i in known)

    def _id(self, character: str, at: int) -> int:
        if character not in self._ids:
            raise CodecError(
                f"holds {character!r} at {at}, which is not in data.vocabulary",
                hint="Add it there, or remove data.vocabulary to read text as bytes",
            )
        return self._ids[character]


def decode_text_into(
    content: bytes | memoryview, out: Ids, vocabulary: Vocabulary | None = None
) -> None:
    """Decode a UTF-8 file into ``out``; see :meth:`Vocabulary.encode`. Raises CodecError."""
    data = bytes(content)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 (byte {data[error.start]:#04x} at {error.start})"
        raise CodecError(rule, hint="Convert it to UTF-8 and pack again") from None
    out[...] = (vocabulary or Vocabulary()).encode(text, len(out))
