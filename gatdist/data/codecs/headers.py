"""What the header of an image says, before any pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ImageFile

from gatdist.data.codecs.color import changes_colors
from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import open_image, png_exif
from gatdist.data.codecs.jpeg import JPEG_MAGIC, read_jpeg_header
from gatdist.data.codecs.levels import color_mode, depth_of, is_gray_image
from gatdist.data.codecs.orientation import (
    ORIENTATION,
    exif_orientation,
    upright_size,
    valid_orientation,
)

JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by the number of channels

_MOST_PIXELS = 2**27
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


class ImageHeader(NamedTuple):
    """What the header of an image says.

    Attributes:
        height: in pixels, when upright.
        width: in pixels, when upright.
        format: Pillow's name, such as ``JPEG``.
        mode: Pillow's name of how its pixels are stored, for messages.
        is_gray: has one channel, or one and transparency.
        orientation: EXIF's, 1 to 8; 1 is upright.
        bits: of each channel, as stored.
        has_alpha: pixels may be transparent.
        profile: ``""`` for none or sRGB, ``"profiles"`` for another ICC profile,
            ``"damaged_profiles"`` for one that can't be used.
        icc: the profile itself; empty without one.
        is_animated: has more images or pages behind the first.
        process: of a JPEG, such as ``progressive``.
    """

    height: int
    width: int
    format: str
    mode: str
    is_gray: bool
    orientation: int
    bits: int = 8
    has_alpha: bool = False
    profile: str = ""
    icc: bytes = b""
    is_animated: bool = False
    process: str = ""

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before it is turned."""
        return upright_size(self.height, self.width, self.orientation)


def read_image_header(content: bytes) -> ImageHeader:
    """Read the header of an image.

    Raises:
        CodecError: it is none, unsupported, or too large.
    """
    with named_errors():
        if content.startswith(JPEG_MAGIC):
            return _described_jpeg(content)
        with open_image(content) as image:
            return _described(image, content)


def read_image_shape(content: bytes) -> tuple[int, int, int]:
    """(C, H, W) of an image by its header, upright; C is 1 (gray) or 3 (any other).

    Raises:
        CodecError: it is no image, or too large.
    """
    header = read_image_header(content)
    return 1 if header.is_gray else 3, header.height, header.width


@contextmanager
def named_errors() -> Iterator[None]:
    """A damaged file makes Pillow raise nearly anything, which becomes a CodecError."""
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"is no readable picture ({described(error)})") from error


def described(error: Exception) -> str:
    """An error in one line, after its type."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _described_jpeg(content: bytes) -> ImageHeader:
    jpeg = read_jpeg_header(content)
    _require_size(jpeg.height, jpeg.width)
    if jpeg.bits != 8 or jpeg.process == "hierarchical" or jpeg.channels not in JPEG_MODES:
        raise CodecError(
            f"is a {jpeg.process} JPEG of {jpeg.bits} bits and {jpeg.channels} channels, which is "
            "not supported: convert it to PNG",
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
    else:  # newer versions of Pillow tell the size of a TIFF when upright, older do not
        orientation = valid_orientation(tags.get(ORIENTATION))
        width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    _require_size(height, width)
    bits = depth_of(image)
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
        bits=bits,
        has_alpha=image.has_transparency_data,
        profile=changes_colors(icc, color_mode(image)),
        icc=icc,
        is_animated=_is_animated(image),
    )


def _exif(image: ImageFile.ImageFile, content: bytes) -> bytes:
    """The EXIF data of an image that is no JPEG and no TIFF."""
    found = png_exif(content) if image.format == "PNG" else image.info.get("exif")
    if found:
        return bytes(found)
    hexadecimal = image.info.get("Raw profile type exif", "")  # ImageMagick's, in a text of PNG
    try:
        return bytes.fromhex("".join(hexadecimal.split("\n")[3:]))
    except (ValueError, AttributeError):
        return b""


def _is_animated(image: ImageFile.ImageFile) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what is behind the first image is damaged, and not our concern
        return True


def _require_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise CodecError(f"has no pixels ({height} × {width})")
    if width * height > _MOST_PIXELS:
        raise CodecError(
            f"is a picture of {height} × {width} pixels (height × width), the most is "
            f"{_MOST_PIXELS:,} in all",
            hint="Take it out, or make it smaller and pack again",
        )
