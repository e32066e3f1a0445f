"""Arrays of numbers: ``.npy`` files."""

from __future__ import annotations

import io
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
    try:
        point = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise CodecError(f"is no readable .npy file ({error})") from error
    if point.shape != out.shape or point.dtype.kind not in "fiu":
        raise CodecError(
            f"is {point.dtype} of shape {point.shape}, expected numbers of shape {out.shape}",
            mend="Pack again",
        )
    if not np.isfinite(point).all():
        raise CodecError(
            "holds numbers that are not finite", mend="Take the sample out and pack again"
        )
    out[...] = point


def encode_array(array: NDArray[Any]) -> bytes:
    """An ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
