"""Files of one sample to arrays and back: pictures, points (``.npy``) and class labels (``.cls``).

Pictures are taken as they are stored: 8 bits a channel, gray or RGB, EXIF orientation ignored. All
else (palettes, transparency, CMYK, 16 bits) is refused by name. Size and channels are compared with
what the manifest says before any pixel is decoded, so that a small file can't unfold into
gigabytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE_COMPONENTS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
POINT_COMPONENT = "npy"
LABEL_COMPONENT = "cls"

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB"}
_JPEG_CHANNELS = {"Gray": 1, "YCbCr": 3, "RGB": 3}
_JPEG_MAGIC = b"\xff\xd8\xff"


class CodecError(ValueError):
    """A file can't be decoded, or holds something else than expected.

    Args:
        problem: what is wrong, to be put after "sample 000042.png".
        mend: what to do about it.
    """

    def __init__(
        self, problem: str, mend: str = "Restore the shard from a copy, or pack again"
    ) -> None:
        super().__init__(problem)
        self.mend = mend


def decode_image(content: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Decode a picture.

    Args:
        content: a whole PNG, JPEG, WebP, BMP or PPM file.
        shape: expected (C, H, W), C being 1 (gray) or 3 (RGB).

    Returns:
        uint8 [H, W, C].

    Raises:
        CodecError: it is no such file, or of another shape or kind.
    """
    return (
        _decode_jpeg(content, shape)
        if content.startswith(_JPEG_MAGIC)
        else _decode_with_pillow(content, shape)
    )


def decode_point(content: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
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


def decode_label(content: bytes, num_classes: int) -> int:
    """Decode a class label, a decimal number below ``num_classes``, or raise CodecError."""
    try:
        label = int(content)
    except ValueError:
        raise CodecError(f"is {content[:40]!r}, expected a whole number") from None
    if not 0 <= label < num_classes:
        raise CodecError(
            f"is class {label}, expected 0 to {num_classes - 1}",
            mend="Pack again with the right labels",
        )
    return label


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W, C], C being 1 or 3, without compression.

    Its bytes depend on the pixels alone. With compression they would depend on the version of zlib,
    and so would the fingerprint of a data set that is written on first use.
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    # Each row of pixels stands behind one byte that names its filter: 0, none.
    rows = np.pad(pixels.reshape(height, width * channels), ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def encode_point(point: NDArray[np.float32]) -> bytes:
    """An ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, point, allow_pickle=False)
    return file.getvalue()


def _decode_jpeg(content: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        channels = _JPEG_CHANNELS.get(colorspace, 0)
        _require(shape, channels, height, width, colorspace)
        # strict=False would fill what is missing of a torn file with gray.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, colorspace="GRAY" if channels == 1 else "RGB", strict=True
        )
    except ValueError as error:
        raise (
            error if isinstance(error, CodecError) else CodecError(f"is no readable JPEG ({error})")
        ) from error
    return pixels


def _decode_with_pillow(content: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        image: Any = Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS)  # reads the header
        channels = {mode: n for n, mode in _MODES.items()}.get(image.mode, 0)
        _require(shape, channels, image.height, image.width, image.mode)
        pixels = np.asarray(image, dtype=np.uint8)
    except CodecError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise CodecError(f"is no readable picture ({type(error).__name__}: {error})") from error
    return pixels.reshape(image.height, image.width, channels)


def _require(
    shape: tuple[int, int, int], channels: int, height: int, width: int, mode: str
) -> None:
    if (channels, height, width) == shape:
        return
    expected = f"{shape[1]} × {shape[2]} {_MODES.get(shape[0], f'with {shape[0]} channels')}"
    raise CodecError(
        f"is a picture of {height} × {width} {mode}, expected {expected} (height × width)",
        mend=f"Pack again with --size {shape[1]}x{shape[2]}",
    )
