"""Arrays of numbers: ``.npy`` files."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.errors import CodecError

POINT_COMPONENT = "npy"


def decode_point(content: bytes | memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Decode an ``.npy`` file of finite numbers to float32 of that shape, or raise CodecError."""
    point = np.empty(shape, dtype=np.float32)
    decode_point_into(content, point)
    return point


def decode_point_into(content: bytes | memoryview, out: NDArray[np.float32]) -> None:
    """Decode an array into ``out``. See :func:`decode_point`."""
    point = read_npy(content)
    if point.shape != out.shape or point.dtype.kind not in "fiu":
        raise CodecError(
            f"is {point.dtype} of shape {point.shape}, expected numbers of shape {out.shape}",
            hint="Pack again",
        )
    if not np.isfinite(point).all():
        raise CodecError(
            "holds numbers that are not finite", hint="Take the sample out and pack again"
        )
    out[...] = point


def read_npy(content: bytes | memoryview) -> NDArray[Any]:
    """The array in an ``.npy`` file, not copied.

    Raises:
        CodecError: it is none, holds objects, or has more or fewer bytes than its header says.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
    except Exception as error:  # NumPy raises nearly anything where a header makes no sense
        problem = " ".join(str(error).split())
        raise CodecError(f"is no readable .npy file ({problem})") from error
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise CodecError(f"is no readable .npy file (it holds {dtype} of shape {shape})")
    start = file.tell()
    stop = start + math.prod(shape) * dtype.itemsize
    if stop > len(content):
        raise CodecError(f"is no readable .npy file (it has {len(content)} bytes, not {stop})")
    if stop < len(content):
        raise CodecError(f"has data after the end at byte {stop}")
    array = np.frombuffer(content, dtype, count=math.prod(shape), offset=start)
    return array.reshape(shape, order="F" if is_fortran else "C")


def encode_array(array: NDArray[Any]) -> bytes:
    """An ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
