"""Sequences of token ids: ``.npy`` files of whole numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.arrays import read_npy
from gatdist.data.codecs.errors import CodecError

TOKENS_COMPONENT = "npy"

Tokens = NDArray[np.int32]


def decode_tokens(content: bytes | memoryview, length: int, num_tokens: int) -> Tokens:
    """Decode the beginning of a sequence.

    Args:
        content: a whole ``.npy`` file, of one dimension.
        length: ids to give.
        num_tokens: of the vocabulary; ids are below it.

    Returns:
        int32 [length].

    Raises:
        CodecError: it is no such file, shorter, or holds an id outside the vocabulary.
    """
    tokens = np.empty(length, dtype=np.int32)
    decode_tokens_into(content, tokens, num_tokens)
    return tokens


def decode_tokens_into(content: bytes | memoryview, out: Tokens, num_tokens: int) -> None:
    """Decode a sequence into ``out``, int32 [length]. See :func:`decode_tokens`."""
    ids = read_npy(content)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise CodecError(
            f"is {ids.dtype} of shape {ids.shape}, expected whole numbers of one dimension",
            hint="Pack again",
        )
    if len(ids) < len(out):
        raise CodecError(
            f"has {len(ids):,} tokens, expected {len(out):,} or more",
            hint=f"Take it out, or set data.length = {len(ids)} or less",
        )
    ids = ids[: len(out)]
    outside = np.flatnonzero((ids < 0) | (ids >= num_tokens))
    if outside.size:
        raise CodecError(
            f"has the token {ids[outside[0]]} at {outside[0]}, expected 0 to {num_tokens - 1}",
            hint="Pack again with the vocabulary that the texts were encoded with",
        )
    out[...] = ids
