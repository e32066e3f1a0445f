"""Arrays of numbers: ``.npy`` files."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.errors import CodecError

POINT_COMPONENT = "npy"


def decode_point(content: bytes | memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Decode an ``.npy`` file of finite numbers to float32 of that shape, or raise CodecError."""
    try:
        point = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise CodecError(f"is no readable .npy file ({error})") from error
    if point.shape != shape or point.dtype.kind not in "fiu":
        raise CodecError(
            f"is {point.dtype} of shape {point.shape}, expected numbers of shape {shape}",
            mend="Pack again",
        )
    if not np.isfinite(point).all():
        raise CodecError(
            "holds numbers that are not finite", mend="Take the sample out and pack again"
        )
    decoded: NDArray[np.float32] = point.astype(np.float32)
    return decoded


def encode_point(point: NDArray[np.float32]) -> bytes:
    """An ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, point, allow_pickle=False)
    return file.getvalue()
