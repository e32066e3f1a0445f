"""Points and token ids: ``.npy`` files."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs import CodecError


def decode_point_into(content: bytes | memoryview, out: NDArray[np.float32]) -> None:
    """Decode an ``.npy`` file of finite numbers into ``out``, of its shape. Raises CodecError."""
    point = read_npy(content)
    if point.shape != out.shape or point.dtype.kind not in "fiu":
        rule = f"is {point.dtype} of shape {point.shape}, expected numbers of shape {out.shape}"
        raise CodecError(rule, hint="Pack again")
    if not np.isfinite(point).all():
        raise CodecError("holds non-finite numbers", hint="Remove the sample and pack again")
    out[...] = point


def decode_tokens_into(
    content: bytes | memoryview, out: NDArray[np.int32], num_tokens: int
) -> None:
    """Decode the first ids of an ``.npy`` file into ``out``, int32 [length]. Raises CodecError."""
    ids = read_npy(content)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        rule = f"is {ids.dtype} of shape {ids.shape}, expected integers of one dimension"
        raise CodecError(rule, hint="Pack again")
    if len(ids) < len(out):
        rule = f"has {len(ids):,} tokens, expected {len(out):,} or more"
        raise CodecError(rule, hint=f"Remove it, or set data.length = {len(ids)} or less")
    ids = ids[: len(out)]
    outside = np.flatnonzero((ids < 0) | (ids >= num_tokens))
    if outside.size:
        rule = f"has token {ids[outside[0]]} at {outside[0]}, expected 0 to {num_tokens - 1}"
        raise CodecError(rule, hint="Pack again with the vocabulary that encoded the text")
    out[...] = ids


def read_npy(content: bytes | memoryview) -> NDArray[Any]:
    """Return the array in an ``.npy`` file, not copied. Raises CodecError."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
    except Exception as error:  # NumPy raises nearly anything for a damaged header
        problem = " ".join(str(error).split())
        raise CodecError(f"is not a readable .npy file ({problem})") from error
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise CodecError(f"is not a readable .npy file (it holds {dtype} of shape {shape})")
    start = file.tell()
    stop = start + math.prod(shape) * dtype.itemsize
    if stop > len(content):
        raise CodecError(f"is not a readable .npy file (it has {len(content)} bytes, not {stop})")
    if stop < len(content):
        raise CodecError(f"has data after its end at byte {stop}")
    array = np.frombuffer(content, dtype, count=math.prod(shape), offset=start)
    return array.reshape(shape, order="F" if is_fortran else "C")


def encode_array(array: NDArray[Any]) -> bytes:
    """Return the array as an ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
