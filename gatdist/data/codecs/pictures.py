"""Pictures: JPEG, PNG, WebP, BMP and PPM files.

Whatever a file holds becomes 8 bits a channel, gray or RGB, upright:

* EXIF's orientation is applied.
* Of 16 bits the upper 8 are taken; palettes and CMYK become RGB; transparency is dropped, and of an
  animation the first picture is taken, as ADM's and torchvision's loaders do.
* Gray becomes RGB by repetition, RGB becomes gray by ITU-R 601's luma.

Size and format are told by the header before any pixel is decoded, so that a small file can't
unfold into gigabytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gatdist.data.codecs.errors import CodecError

IMAGE_COMPONENTS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "pgm")
FILTERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}

Pixels = NDArray[np.uint8]

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
_MODES = {1: "L", 3: "RGB"}
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
_COLOR_SPACES = {1: "GRAY", 3: "RGB"}
_MOST_PIXELS = 2**27
_JPEG_MAGIC = b"\xff\xd8\xff"
# Segments that may stand before a JPEG's picture: APP0 to APP15, and comments. EXIF is in APP1.
_APP0, _APP1, _APP15, _COMMENT = 0xE0, 0xE1, 0xEF, 0xFE


def decode_image(
    content: bytes | memoryview, shape: tuple[int, int, int], resize: str | None = None
) -> Pixels:
    """Decode a picture.

    Args:
        content: a whole file.
        shape: (C, H, W), C being 1 (gray) or 3 (RGB).
        resize: a name of ``FILTERS``: a picture of another size is cut to the aspect of H × W about
            its centre, and resized by it. None: it is refused.

    Returns:
        uint8 [H, W, C].

    Raises:
        CodecError: it is no such file, damaged, or of another size.
    """
    channels, height, width = shape
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    decode_image_into(content, pixels, resize)
    return pixels


def decode_image_into(content: bytes | memoryview, out: Pixels, resize: str | None = None) -> None:
    """Decode a picture into ``out``, contiguous uint8 [H, W, C]. See :func:`decode_image`."""
    if content[:3] == _JPEG_MAGIC and _decoded_upright_jpeg(content, out):
        return
    height, width, channels = out.shape
    try:
        with Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS) as image:  # its header
            found_height, found_width = _upright_size(image)
            is_right = (found_height, found_width) == (height, width)
            if not is_right and resize is None:
                expected = f"{height} × {width} {_MODES[channels]}"
                raise CodecError(
                    f"is a picture of {found_height} × {found_width} {image.mode}, expected "
                    f"{expected} (height × width)",
                    mend="Set data.resolution, so that it is resized, or pack again with --size "
                    f"{height}x{width}",
                )
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert(_MODES[channels])
            if not is_right:
                assert resize is not None
                upright = ImageOps.fit(upright, (width, height), method=FILTERS[resize])
            out[...] = np.asarray(upright).reshape(height, width, channels)
    except CodecError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CodecError(f"is no readable picture ({reason})") from error


def read_image_shape(content: bytes) -> tuple[int, int, int]:
    """(C, H, W) of a picture by its header, upright; C is 1 (gray) or 3 (any other).

    Raises:
        CodecError: it is no picture, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_PILLOW_FORMATS) as image:
            return 1 if image.mode in _GRAY_MODES else 3, *_upright_size(image)
    except CodecError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CodecError(f"is no readable picture ({reason})") from error


def encode_png(pixels: Pixels, *, compression: int = 0) -> bytes:
    """A PNG file of uint8 [H, W, C], C being 1 or 3.

    Without compression its bytes depend on the pixels alone. With it they depend on the version of
    zlib, and so would the fingerprint of a data set that is written on first use.

    Args:
        pixels: of the picture.
        compression: 0 for none, to 9.
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    # Each row of pixels stands behind one byte that names its filter: 0, none.
    rows = np.pad(pixels.reshape(height, width * channels), ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, compression)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _decoded_upright_jpeg(content: bytes | memoryview, out: Pixels) -> bool:
    """The fast way for a JPEG that fits as it is; False where Pillow has to look at it."""
    if _may_have_exif(content):
        return False
    try:
        # strict=False would fill what is missing of a torn file with gray.
        decoded = simplejpeg.decode_jpeg(
            content, colorspace=_COLOR_SPACES[out.shape[2]], buffer=out, strict=True
        )
    except ValueError:  # larger than `out`, damaged, or CMYK
        return False
    return bool(decoded.shape == out.shape)


def _may_have_exif(jpeg: bytes | memoryview) -> bool:
    """Whether an EXIF segment stands before the picture, as far as can be told."""
    at, end = 2, len(jpeg) - 4
    while at < end and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == _APP1:
            return True
        if not _APP0 <= marker <= _APP15 and marker != _COMMENT:
            return False
        at += 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
    return False


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width when upright; the pixels are not looked at."""
    if image.width * image.height > _MOST_PIXELS:
        raise CodecError(
            f"is a picture of {image.height} × {image.width} pixels (height × width), the most is "
            f"{_MOST_PIXELS:,} in all",
            mend="Take it out, or make it smaller and pack again",
        )
    orientation = image.getexif().get(0x0112, 1)
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits, which Pillow only keeps where a picture is gray, the upper 8."""
    if not image.mode.startswith("I"):
        return image
    levels: Any = np.asarray(image).astype(np.uint32) >> 8
    return Image.fromarray(levels.astype(np.uint8))
