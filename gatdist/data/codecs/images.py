"""Images: JPEG, PNG, WebP, TIFF, BMP, GIF, PPM and AVIF files, decoded to opaque, upright sRGB.

The result is gray or RGB of 8 or 16 bits. Damaged ICC profiles are ignored, as are PNG's ``gAMA``,
``cHRM``, ``sRGB`` and ``cICP``. 16 bits are reduced to 8 by dropping the lower byte; fewer bits are
stretched. The first frame or page is used. simplejpeg decodes JPEGs, except CMYK and those that it
refuses. The header is checked first: a small file can't expand to gigabytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.formats import (
    JPEG_MAGIC,
    ORIENTATION,
    exif_orientation,
    open_image,
    png_exif,
    read_jpeg_header,
    upright,
    upright_size,
    valid_orientation,
)
from gatdist.data.codecs.levels import (
    Color,
    Levels,
    Stored,
    changes_colors,
    color_mode,
    depth_of,
    is_gray_image,
    onto,
    read_levels,
    to_srgb,
    with_channels,
)

FILTERS: Mapping[str, Image.Resampling] = {
    name: Image.Resampling[name.upper()]
    for name in ("lanczos", "bicubic", "hamming", "bilinear", "box")
}
WHITE: Color = (255, 255, 255)

_MODES = {1: "L", 3: "RGB"}
_COLOR_SPACES = {1: "GRAY", 3: "RGB"}
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by number of channels

_MAX_PIXELS = 2**27
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


class ImageHeader(NamedTuple):
    """Header of an image."""

    height: int  # in pixels, when upright
    width: int  # in pixels, when upright
    format: str  # Pillow's name, such as ``JPEG``
    mode: str  # Pillow's name of the pixel mode, for messages
    is_gray: bool  # has one channel, or one and transparency
    orientation: int  # EXIF orientation, 1 to 8; 1 is upright
    bits: int = 8  # per channel, as stored
    has_alpha: bool = False  # pixels may be transparent
    # "" for none or sRGB, "profiles" for another ICC profile, "damaged_profiles" if unusable.
    profile: str = ""
    icc: bytes = b""  # ICC profile; empty if absent
    is_animated: bool = False  # has more frames or pages
    process: str = ""  # of a JPEG, such as ``progressive``

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before rotation."""
        return upright_size(self.height, self.width, self.orientation)


def read_image_header(content: bytes) -> ImageHeader:
    """Read the header. Raises CodecError if not an image, unsupported, or too large."""
    with _named_errors():
        if content.startswith(JPEG_MAGIC):
            return _jpeg_header(content)
        with open_image(content) as image:
            return _read_header(image, content)


def read_image_shape(content: bytes) -> tuple[int, int, int]:
    """Return the upright (C, H, W) in the header; C is 1 (gray) or 3. Raises CodecError."""
    header = read_image_header(content)
    return 1 if header.is_gray else 3, header.height, header.width


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"is not a readable image ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _jpeg_header(content: bytes) -> ImageHeader:
    jpeg = read_jpeg_header(content)
    _require_size(jpeg.height, jpeg.width)
    if jpeg.bits != 8 or jpeg.process == "hierarchical" or jpeg.channels not in _JPEG_MODES:
        raise CodecError(
            f"is a {jpeg.process} JPEG of {jpeg.bits} bits and {jpeg.channels} channels, which is "
            "not supported",
            hint="Convert it to PNG",
        )
    height, width = upright_size(jpeg.height, jpeg.width, jpeg.orientation)
    mode = _JPEG_MODES[jpeg.channels]
    return ImageHeader(
        height=height,
        width=width,
        format="JPEG",
        mode=mode,
        is_gray=mode == "L",
        orientation=jpeg.orientation,
        profile=changes_colors(jpeg.profile, mode),
        icc=jpeg.profile,
        process=jpeg.process,
    )


def _read_header(image: ImageFile.ImageFile, content: bytes) -> ImageHeader:
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        orientation, (width, height) = exif_orientation(_exif(image, content)), image.size
    else:  # only newer versions of Pillow give the upright size of a TIFF
        orientation = valid_orientation(tags.get(ORIENTATION))
        width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    _require_size(height, width)
    icc = image.info.get("icc_profile", b"")
    icc = icc if isinstance(icc, bytes) else b"damaged"
    height, width = upright_size(height, width, orientation)
    return ImageHeader(
        height=height,
        width=width,
        format=image.format or "",
        mode=image.mode,
        is_gray=is_gray_image(image),
        orientation=orientation,
        bits=depth_of(image),
        has_alpha=image.has_transparency_data,
        profile=changes_colors(icc, color_mode(image)),
        icc=icc,
        is_animated=_is_animated(image),
    )


def _exif(image: ImageFile.ImageFile, content: bytes) -> bytes:
    found = png_exif(content) if image.format == "PNG" else image.info.get("exif")
    if found:
        return bytes(found)
    hexadecimal = image.info.get("Raw profile type exif", "")  # ImageMagick writes it as PNG text
    try:
        return bytes.fromhex("".join(hexadecimal.split("\n")[3:]))
    except (ValueError, AttributeError):
        return b""


def _is_animated(image: ImageFile.ImageFile) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first frame does not matter
        return True


def _require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise CodecError(f"has no pixels ({height} × {width})")
    if width * height > _MAX_PIXELS:
        raise CodecError(
            f"has {height} × {width} pixels (height × width), the limit is {_MAX_PIXELS:,} in all",
            hint="Remove it, or make it smaller and pack again",
        )


class DecodedImage(NamedTuple):
    """Decoded pixels and remarks."""

    pixels: Levels  # upright
    # Details by kind: transparent, profiles, damaged_profiles, reduced (16 bits became 8).
    remarks: Mapping[str, str]


def decode_image_into(content: bytes | memoryview, out: Levels, resize: str | None = None) -> None:
    """Decode an image into ``out``, uint8 or uint16 [H, W, 1 or 3], on white. Raises CodecError.

    ``resize`` is the name in ``FILTERS`` for center-cropping to the aspect ratio of H × W, and
    resizing; None refuses another size.
    """
    content = bytes(content)  # bytes are not copied
    height, width, channels = out.shape
    if content.startswith(JPEG_MAGIC):
        jpeg = read_jpeg_header(content)
        mode = _JPEG_MODES.get(jpeg.channels, "")
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
    """Decode an image to gray or RGB of 8 or 16 bits, at its own size. Raises CodecError.

    ``background`` is visible through transparent pixels. Pass the ``header`` if already read.
    """
    with _named_errors():
        header = header or read_image_header(content)
        levels, orientation, remarks = _opaque(content, header, channels, bits, background)
        pixels = upright(levels, orientation)
        if pixels.shape[:2] != (header.height, header.width):
            raise CodecError(
                f"has {pixels.shape[0]} × {pixels.shape[1]} pixels, its header says "
                f"{header.height} × {header.width}"
            )
        return DecodedImage(with_channels(pixels, channels), remarks)


def change_image(pixels: Levels, change: Callable[[Image.Image], Image.Image]) -> Levels:
    """Apply a function that resizes a Pillow image to pixels [H, W, C] of 8 or 16 bits."""
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


def encode_png(pixels: Levels, *, compression: int = 0) -> bytes:
    """Return pixels, uint8 or uint16 [H, W, 1 or 3], as a PNG file.

    With compression (1 to 9), its bytes depend on the version of zlib.
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
        rule = f"is not a readable image ({header.process} JPEG: {_one_line(error)})"
        raise CodecError(rule) from error


def _decoded_jpeg(
    content: bytes, space: str, size: tuple[int, int], out: Levels | None = None
) -> Levels | None:
    """Decode a JPEG with simplejpeg, not rotated; None if Pillow must decode it, as CMYK."""
    try:
        # strict=False would fill the missing part of a truncated file with gray.
        decoded: Levels = simplejpeg.decode_jpeg(content, colorspace=space, buffer=out, strict=True)
    except ValueError:  # damaged, or larger than its header says
        return None
    return decoded if decoded.shape[:2] == size else None


def _num_levels(levels: Levels) -> int:
    return int(np.count_nonzero(np.bincount(levels.ravel())))


def _upper_byte(levels: Levels) -> Levels:
    return (levels >> 8).astype(np.uint8)
