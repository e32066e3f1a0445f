"""Image headers, read before any pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ImageFile

from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import (
    JPEG_MAGIC,
    ORIENTATION,
    exif_orientation,
    open_image,
    png_exif,
    read_jpeg_header,
    upright_size,
    valid_orientation,
)
from gatdist.data.codecs.levels import changes_colors, color_mode, depth_of, is_gray_image

JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by number of channels

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
    # ``""`` for none or sRGB, ``"profiles"`` for another ICC profile, ``"damaged_profiles"`` for an
    # unusable one
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
    with named_errors():
        if content.startswith(JPEG_MAGIC):
            return _described_jpeg(content)
        with open_image(content) as image:
            return _described(image, content)


def read_image_shape(content: bytes) -> tuple[int, int, int]:
    """Return the upright (C, H, W) in the header; C is 1 (gray) or 3. Raises CodecError."""
    header = read_image_header(content)
    return 1 if header.is_gray else 3, header.height, header.width


@contextmanager
def named_errors() -> Iterator[None]:
    """Raise any error as CodecError: Pillow raises nearly anything for a damaged file."""
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"is not a readable image ({described(error)})") from error


def described(error: Exception) -> str:
    """Return an error in one line, after its type."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _described_jpeg(content: bytes) -> ImageHeader:
    jpeg = read_jpeg_header(content)
    _require_size(jpeg.height, jpeg.width)
    if jpeg.bits != 8 or jpeg.process == "hierarchical" or jpeg.channels not in JPEG_MODES:
        raise CodecError(
            f"is a {jpeg.process} JPEG of {jpeg.bits} bits and {jpeg.channels} channels, which is "
            "not supported",
            hint="Convert it to PNG",
        )
    height, width = upright_size(jpeg.height, jpeg.width, jpeg.orientation)
    mode = JPEG_MODES[jpeg.channels]
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


def _described(image: ImageFile.ImageFile, content: bytes) -> ImageHeader:
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
