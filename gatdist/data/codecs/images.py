"""Images: JPEG, PNG, WebP, TIFF, BMP, GIF, PPM and AVIF files.

Images are decoded to opaque, upright gray or RGB in sRGB, 8 or 16 bits per channel. Packing,
indexing, verifying and training share this code:

* The content of a file decides its format, not its extension.
* EXIF orientation is applied; see :mod:`~gatdist.data.codecs.formats`.
* ICC profiles are converted to sRGB (gray, RGB, CMYK; Lab without one). A damaged profile is
  ignored, as are PNG's ``gAMA``, ``cHRM``, ``sRGB`` and ``cICP``.
* Transparency is composited on a background, white by default.
* 16 bits are reduced to 8 by dropping the lower byte; 1 to 12 bits are stretched. Integers of 32
  bits, signed and floating-point levels are refused, since their range is unknown.
* Gray becomes RGB by repetition, RGB becomes gray by ITU-R 601 luma.
* The first frame of an animation, or the first page, is used.

simplejpeg decodes JPEGs, except CMYK and those that it refuses, which Pillow decodes. The header is
checked before any pixel is decoded: a small file can't expand to gigabytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import JPEG_MAGIC, read_jpeg_header, upright
from gatdist.data.codecs.headers import (
    JPEG_MODES,
    ImageHeader,
    described,
    named_errors,
    read_image_header,
)
from gatdist.data.codecs.levels import (
    Color,
    Levels,
    Stored,
    changes_colors,
    onto,
    read_levels,
    to_srgb,
    with_channels,
)

FILTERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
WHITE: Color = (255, 255, 255)

Pixels = NDArray[Any]  # uint8 or uint16 [H, W, C]

_MODES = {1: "L", 3: "RGB"}
_COLOR_SPACES = {1: "GRAY", 3: "RGB"}


class DecodedImage(NamedTuple):
    """Decoded pixels and remarks."""

    pixels: Pixels  # upright
    # Details by kind: transparent, profiles, damaged_profiles, reduced (16 bits became 8).
    remarks: Mapping[str, str]


def decode_image_into(content: bytes | memoryview, out: Pixels, resize: str | None = None) -> None:
    """Decode an image into ``out``. Transparent images are composited on white.

    Args:
        content: a whole file.
        out: contiguous uint8 or uint16 [H, W, C]; C is 1 (gray) or 3 (RGB).
        resize: name in ``FILTERS``: center-crop an image of another size to the aspect ratio of
            H × W, and resize it. None: refuse it.

    Raises:
        CodecError: not an image, damaged, or of another size.
    """
    content = bytes(content)  # bytes are not copied
    height, width, channels = out.shape
    if content.startswith(JPEG_MAGIC):
        jpeg = read_jpeg_header(content)
        mode = JPEG_MODES.get(jpeg.channels, "")
        if (
            (jpeg.height, jpeg.width, jpeg.orientation) == (height, width, 1)
            and out.dtype == np.uint8
            and mode in ("L", "RGB")
            and changes_colors(jpeg.profile, mode) != "profiles"
            and _decoded_jpeg(content, _COLOR_SPACES[channels], (height, width), out) is not None
        ):
            return
    header = read_image_header(content)
    is_right_size = (header.height, header.width) == (height, width)
    if not is_right_size and resize is None:
        raise CodecError(
            f"is {header.height} × {header.width} {header.mode}, expected "
            f"{height} × {width} {_MODES[channels]} (height × width)",
            hint=f"Set data.resolution to resize it, or pack again with --size {height}x{width}",
        )
    pixels = decode_pixels(content, channels, bits=8 * out.itemsize, header=header).pixels
    if not is_right_size:
        assert resize is not None
        fit = partial(ImageOps.fit, size=(width, height), method=FILTERS[resize])
        pixels = change_image(pixels, fit)
    out[...] = pixels


def decode_pixels(
    content: bytes,
    channels: int,
    *,
    bits: int = 8,
    background: Color = WHITE,
    header: ImageHeader | None = None,
) -> DecodedImage:
    """Decode an image to 1 (gray) or 3 (RGB) channels of 8 or 16 bits, at its own size.

    ``background`` is visible through transparent pixels. Pass the ``header`` if already read.

    Raises:
        CodecError: not an image, damaged, unsupported or too large.
    """
    with named_errors():
        header = header or read_image_header(content)
        levels, orientation, remarks = _opaque(content, header, channels, bits, background)
        pixels = upright(levels, orientation)
        if pixels.shape[:2] != (header.height, header.width):
            raise CodecError(
                f"has {pixels.shape[0]} × {pixels.shape[1]} pixels, its header says "
                f"{header.height} × {header.width}"
            )
        return DecodedImage(with_channels(pixels, channels), remarks)


def change_image(pixels: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Apply a function that resizes a Pillow image to pixels [H, W, C] of 8 or 16 bits.

    Pillow has no color images of 16 bits: their channels are changed one by one, as floats.
    """
    if pixels.dtype == np.uint8:
        array: Any = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        changed = change(Image.fromarray(np.ascontiguousarray(array)))
        return np.asarray(changed).reshape(changed.height, changed.width, -1)
    planes = [
        np.asarray(change(Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))))
        for plane in np.moveaxis(pixels, 2, 0)
    ]
    most = np.iinfo(pixels.dtype).max
    return np.clip(np.rint(np.stack(planes, axis=2)), 0, most).astype(pixels.dtype)


def encode_png(pixels: Pixels, *, compression: int = 0) -> bytes:
    """Return pixels, uint8 or uint16 [H, W, 1 or 3], as a PNG file.

    Without compression (0 to 9), its bytes depend on the pixels alone, otherwise also on the
    version of zlib; and so would the fingerprint of a built-in data set.
    """
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, kind, 0, 0, 0)
    # Each row begins with a byte that names its filter: 0, none.
    stored = pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8)
    rows = np.pad(stored.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, compression)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _opaque(
    content: bytes, header: ImageHeader, channels: int, bits: int, background: Color
) -> tuple[Levels, int, dict[str, str]]:
    """Return opaque sRGB pixels, the orientation still to apply, and remarks."""
    remarks: dict[str, str] = {}
    color, alpha, orientation = _stored(content, header, channels)
    if isinstance(color, np.ndarray) and bits == 8:
        before = _num_levels(color)
        color, alpha = _upper_byte(color), None if alpha is None else _upper_byte(alpha)
        after = _num_levels(color)
        remarks["reduced"] = f"{before:,} levels became {after:,}"
        color = Image.fromarray(color[..., 0] if color.shape[2] == 1 else color)
    elif header.bits == 16 and isinstance(color, Image.Image):
        remarks["reduced"] = f"{color.mode} of 16 bits is read with 8"
    if isinstance(color, Image.Image):
        image, found = to_srgb(color, header.icc)
        levels = np.asarray(image).reshape(image.height, image.width, -1)
    else:
        levels, found = color, header.profile
        if found == "profiles":
            rule = "has 16 bits and a color profile, which can only be converted with 8 bits"
            raise CodecError(rule, hint="Convert it to sRGB, or pack with --bits 8")
    if found:
        remarks[found] = ""
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        remarks["transparent"] = ""
        levels = onto(levels, alpha, background)
    if bits == 16 and levels.itemsize == 1:
        levels = levels.astype(np.uint16) * np.uint16(257)
    return levels, orientation, remarks


def _stored(content: bytes, header: ImageHeader, channels: int) -> Stored:
    if header.format != "JPEG":
        return read_levels(content, header.orientation)
    if header.mode in ("L", "RGB"):
        # A color JPEG stores luma, unless a profile redefines its colors.
        gray = header.is_gray or (channels == 1 and header.profile != "profiles")
        decoded = _decoded_jpeg(content, "GRAY" if gray else "RGB", header.stored_size)
        if decoded is not None:
            array: Any = decoded[..., 0] if decoded.shape[2] == 1 else decoded
            return Stored(Image.fromarray(array), None, header.orientation)
    try:
        return read_levels(content, header.orientation)
    except CodecError:
        raise
    except Exception as error:
        rule = f"is not a readable image ({header.process} JPEG: {described(error)})"
        raise CodecError(rule) from error


def _decoded_jpeg(
    content: bytes, space: str, size: tuple[int, int], out: Pixels | None = None
) -> Pixels | None:
    """Decode a JPEG with simplejpeg, not rotated; None if Pillow must decode it.

    simplejpeg would decode CMYK, too, by a formula of its own.
    """
    try:
        # strict=False would fill the missing part of a truncated file with gray.
        decoded: Pixels = simplejpeg.decode_jpeg(content, colorspace=space, buffer=out, strict=True)
    except ValueError:  # damaged, or larger than its header says
        return None
    return decoded if decoded.shape[:2] == size else None


def _num_levels(levels: Levels) -> int:
    return int(np.count_nonzero(np.bincount(levels.ravel())))


def _upper_byte(levels: Levels) -> Levels:
    return (levels >> 8).astype(np.uint8)
