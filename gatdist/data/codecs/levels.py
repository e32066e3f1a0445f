"""The levels that an image stores, with all their bits, and its transparency.

Pillow has no colour images of 16 bits and keeps the upper byte of each level. The bytes behind it
are read by opening the file again and asking for the other byte of each pair.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from gatdist.data.codecs.color import Levels
from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.formats import open_image
from gatdist.data.codecs.orientation import ORIENTATION

_PHOTOMETRIC, _PLANES, _BITS, _SAMPLE_FORMAT = 262, 284, 258, 339  # of TIFF
_GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B")
_GRAY_ALPHA_16 = "LA;16B"
_SIXTEEN = (";16B", ";16L", ";16N")
_CONVERT = "Convert it to 8 or 16 bits"


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        color: an image of mode L, RGB, CMYK or LAB; levels of more than 8 bits as uint16 [H, W, C].
        alpha: opacity [H, W, 1], of as many bits; None where nothing can be transparent.
        orientation: EXIF's, that is still to be applied.
    """

    color: Image.Image | Levels
    alpha: Levels | None
    orientation: int


def is_gray_image(image: ImageFile.ImageFile) -> bool:
    """Whether it has one channel, or one and transparency."""
    return image.mode in _GRAY_MODES or _raw_mode(image) == _GRAY_ALPHA_16


def color_mode(image: ImageFile.ImageFile) -> str:
    """Mode of its colours, as :func:`read_levels` returns them: L, RGB, CMYK or LAB."""
    if is_gray_image(image):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def depth_of(image: ImageFile.ImageFile) -> int:
    """Bits of each channel as they are stored: 16 if more than 8, else 8.

    Raises:
        CodecError: its levels have no known range.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or max(_numbers(tags, _SAMPLE_FORMAT), default=1) == 3:
        raise CodecError("has floating-point levels, whose range is not known", hint=_CONVERT)
    if max(_numbers(tags, _SAMPLE_FORMAT), default=1) == 2:
        raise CodecError("has signed levels, which is not supported", hint=_CONVERT)
    if image.mode == "I" and image.format != "PPM":
        raise CodecError("has levels of 32 bits, whose range is not known", hint=_CONVERT)
    is_deep = image.mode.startswith("I") or _raw_mode(image).endswith(_SIXTEEN)
    if is_deep and tags.get(_PLANES) == 2:
        raise CodecError("has 16 bits in separate planes, which is not supported", hint=_CONVERT)
    return 16 if is_deep or _ppm_max(image) > 255 else 8


def read_levels(content: bytes, orientation: int) -> Stored:
    """Decode an image that is not decoded by simplejpeg.

    Args:
        content: a whole file.
        orientation: EXIF's.

    Raises:
        CodecError: it is no image that is supported.
        Exception: nearly any, where it is damaged.
    """
    with open_image(content) as image:
        deep = depth_of(image) == 16
        raw, key = _raw_mode(image), image.info.get("transparency")
        if deep and raw == _GRAY_ALPHA_16:
            pairs, left = _unpacked(content, "RGBA", orientation)
            both = pairs[..., ::2].astype(np.uint16) << 8 | pairs[..., 1::2]
            return Stored(both[..., :1], both[..., 1:], left)
        if deep and image.mode in ("RGB", "RGBA") and raw.endswith(_SIXTEEN):
            color, alpha, left = _deep_colors(content, raw, orientation)
            return Stored(color, _keyed(color, key) if alpha is None else alpha, left)
        if image.tile and image.tile[0][0] == "ppm":
            return Stored(_ppm_levels(image, content), None, orientation)
        left = _load(image, orientation)
        if deep and image.mode.startswith("I"):
            gray = _deep_gray(image)
            return Stored(gray, _keyed(gray, key), left)
        return Stored(*_plain(image, content, key), left)


def _plain(image: Image.Image, content: bytes, key: Any) -> tuple[Image.Image, Levels | None]:
    """Colours and alpha of 8 bits."""
    if image.mode in ("P", "PA", "La", "RGBa"):
        alpha = image.has_transparency_data
        image, key = image.convert({"La": "LA"}.get(image.mode, "RGBA" if alpha else "RGB")), None
    if image.mode in ("LA", "RGBA"):
        *colors, opacity = image.split()
        opaque = Image.merge("RGB", colors) if len(colors) == 3 else colors[0]
        return opaque, np.asarray(opacity)[..., None]
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        if image.mode == "1":
            key = None if key is None else (255 if key else 0)
        image = image.convert("L" if image.mode == "1" else "RGB")
    elif image.mode == "L" and isinstance(key, int) and image.format == "PNG":
        # Pillow stretches gray of 2 and 4 bits, and leaves the key as it stands in the file.
        key = key * 255 // (2 ** content[24] - 1)
    if image.mode not in ("L", "RGB"):
        return image, None
    pixels = np.asarray(image)
    return image, _keyed(pixels.reshape(*pixels.shape[:2], -1), key)


def _keyed(levels: Levels, key: Any) -> Levels | None:
    """Opacity of PNG's colour key: pixels of that very colour are transparent."""
    if key is None or isinstance(key, bytes):
        return None
    most = np.iinfo(levels.dtype).max
    numbers = np.atleast_1d(np.asarray(key, dtype=np.int64)) & most
    if len(numbers) != levels.shape[2]:
        return None
    return np.where((levels == numbers).all(axis=2, keepdims=True), 0, most).astype(levels.dtype)


def _deep_gray(image: Image.Image) -> Levels:
    levels: NDArray[Any] = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    bits = max(_numbers(tags, _BITS), default=16)
    if bits < 16:
        levels = levels * 65535 // (2**bits - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow overlooks at this depth
        levels = 65535 - levels
    return levels[..., None].astype(np.uint16)


def _deep_colors(content: bytes, raw: str, orientation: int) -> tuple[Levels, Levels | None, int]:
    """Colours of 16 bits, their alpha, and the orientation that is left."""
    kind, order = raw[:-1].replace("RGBa", "RGBA"), raw[-1]
    first, left = _unpacked(content, f"{kind}B", orientation)
    second, _ = _unpacked(content, f"{kind}L", orientation)
    if order == "L" or (order == "N" and sys.byteorder == "little"):
        first, second = second, first
    levels = first.astype(np.uint16) << 8 | second
    if levels.shape[2] == 3:
        return levels, None, left
    color, alpha = levels[..., :3], levels[..., 3:]
    if raw.startswith("RGBa"):  # multiplied by alpha already
        whole = color.astype(np.uint32) * np.uint32(65535) // np.maximum(alpha, 1)
        color = np.minimum(whole, 65535).astype(np.uint16)
    return color, alpha, left


def _unpacked(content: bytes, raw: str, orientation: int) -> tuple[NDArray[np.uint8], int]:
    """Pixels as ``raw`` says instead of Pillow's choice, and the orientation that is left."""
    with open_image(content) as image:
        tiles: list[Any] = list(image.tile)
        image.tile = [
            type(tile)._make((*tile[:3], raw if isinstance(tile[3], str) else (raw, *tile[3][1:])))
            for tile in tiles
        ]
        left = _load(image, orientation)
        return np.asarray(image), left


def _load(image: ImageFile.ImageFile, orientation: int) -> int:
    """Decode, and return the orientation that is still to be applied.

    Pillow turns a TIFF by itself: it is told our orientation, and removes the tag when it did.
    """
    if image.format != "TIFF":
        image.load()
        return orientation
    image.getexif()[ORIENTATION] = orientation
    image.load()
    return int(image.getexif().get(ORIENTATION, 1))


def _ppm_max(image: ImageFile.ImageFile) -> int:
    """The largest level of a PPM file; 0 for other files."""
    if image.format != "PPM" or not image.tile or not isinstance(image.tile[0][3], tuple):
        return 0
    most = image.tile[0][3][-1]
    return most if isinstance(most, int) else 0


def _ppm_levels(image: ImageFile.ImageFile, content: bytes) -> Image.Image | Levels:
    """Binary PPM of a range other than 8 bits, which Pillow reads byte by byte in Python."""
    found, most = _ppm_max(image), 65535 if _ppm_max(image) > 255 else 255
    bands = 3 if image.mode == "RGB" else 1
    count = image.height * image.width * bands
    kind = np.dtype(">u2" if found > 255 else "u1")
    stored = np.frombuffer(content, kind, count, image.tile[0][2]).astype(np.int64)
    levels = (np.minimum(stored, found) * most * 2 + found) // (2 * found)
    shape = image.height, image.width, bands
    if most == 255:
        plain = levels.astype(np.uint8).reshape(shape)
        return Image.fromarray(plain[..., 0] if bands == 1 else plain)
    return levels.astype(np.uint16).reshape(shape)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the first tile's pixels are packed, by Pillow's name."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    """The whole numbers of a TIFF tag."""
    found = tags.get(tag, ())
    values = found if isinstance(found, tuple) else (found,)
    return tuple(value for value in values if isinstance(value, int))
