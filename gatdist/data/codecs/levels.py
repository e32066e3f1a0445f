"""Pixels as stored: all their bits, transparency, and conversion to opaque sRGB.

Pillow has no color images of 16 bits and keeps the upper byte of each level. The lower bytes are
read by opening the file again and selecting the other byte of each pair.
"""

from __future__ import annotations

import io
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.formats import ORIENTATION, open_image

Levels = NDArray[Any]  # uint8 or uint16 [H, W, C]
Color = tuple[int, int, int]  # 8 bits each, sRGB

# A profile that changes no color of a grid by more levels than this counts as sRGB.
_SAME_LEVELS = 2
_GRID = 17
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 in 1/65,536, as in Pillow
_PHOTOMETRIC, _PLANES, _BITS, _SAMPLE_FORMAT = 262, 284, 258, 339  # of TIFF
_GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B")
_GRAY_ALPHA_16 = "LA;16B"
_SIXTEEN = (";16B", ";16L", ";16N")
_CONVERT = "Convert it to 8 or 16 bits"


class Stored(NamedTuple):
    """Pixels as stored in a file."""

    # An image of mode L, RGB, CMYK or LAB; levels of more than 8 bits as uint16 [H, W, C].
    color: Image.Image | Levels
    alpha: Levels | None  # opacity [H, W, 1] with as many bits; None without transparency
    orientation: int  # EXIF orientation still to be applied


def is_gray_image(image: ImageFile.ImageFile) -> bool:
    """Return whether an image has one channel, or one and transparency."""
    return image.mode in _GRAY_MODES or _raw_mode(image) == _GRAY_ALPHA_16


def color_mode(image: ImageFile.ImageFile) -> str:
    """Return the mode of colors from :func:`read_levels`: L, RGB, CMYK or LAB."""
    if is_gray_image(image):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


def depth_of(image: ImageFile.ImageFile) -> int:
    """Return 16 if more than 8 bits per channel are stored, else 8. Raises CodecError."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or max(_numbers(tags, _SAMPLE_FORMAT), default=1) == 3:
        raise CodecError("has floating-point levels, whose range is unknown", hint=_CONVERT)
    if max(_numbers(tags, _SAMPLE_FORMAT), default=1) == 2:
        raise CodecError("has signed levels, which are not supported", hint=_CONVERT)
    if image.mode == "I" and image.format != "PPM":
        raise CodecError("has levels of 32 bits, whose range is unknown", hint=_CONVERT)
    is_deep = image.mode.startswith("I") or _raw_mode(image).endswith(_SIXTEEN)
    if is_deep and tags.get(_PLANES) == 2:
        raise CodecError("has 16 bits in separate planes, which is not supported", hint=_CONVERT)
    return 16 if is_deep or _ppm_max(image) > 255 else 8


def read_levels(content: bytes, orientation: int) -> Stored:
    """Decode an image with Pillow, given its EXIF orientation. Raises nearly any error."""
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
        # Pillow stretches gray of 2 and 4 bits, but not the color key.
        key = key * 255 // (2 ** content[24] - 1)
    if image.mode not in ("L", "RGB"):
        return image, None
    pixels = np.asarray(image)
    return image, _keyed(pixels.reshape(*pixels.shape[:2], -1), key)


def _keyed(levels: Levels, key: Any) -> Levels | None:
    """Return opacity from PNG's color key: pixels of exactly that color are transparent."""
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
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow ignores that at this depth
        levels = 65535 - levels
    return levels[..., None].astype(np.uint16)


def _deep_colors(content: bytes, raw: str, orientation: int) -> tuple[Levels, Levels | None, int]:
    kind, order = raw[:-1].replace("RGBa", "RGBA"), raw[-1]
    first, left = _unpacked(content, f"{kind}B", orientation)
    second, _ = _unpacked(content, f"{kind}L", orientation)
    if order == "L" or (order == "N" and sys.byteorder == "little"):
        first, second = second, first
    levels = first.astype(np.uint16) << 8 | second
    if levels.shape[2] == 3:
        return levels, None, left
    color, alpha = levels[..., :3], levels[..., 3:]
    if raw.startswith("RGBa"):  # premultiplied by alpha
        whole = color.astype(np.uint32) * np.uint32(65535) // np.maximum(alpha, 1)
        color = np.minimum(whole, 65535).astype(np.uint16)
    return color, alpha, left


def _unpacked(content: bytes, raw: str, orientation: int) -> tuple[NDArray[np.uint8], int]:
    with open_image(content) as image:
        tiles: list[Any] = list(image.tile)
        image.tile = [
            type(tile)._make((*tile[:3], raw if isinstance(tile[3], str) else (raw, *tile[3][1:])))
            for tile in tiles
        ]
        left = _load(image, orientation)
        return np.asarray(image), left


def _load(image: ImageFile.ImageFile, orientation: int) -> int:
    """Decode, and return the remaining orientation: Pillow itself rotates a TIFF."""
    if image.format != "TIFF":
        image.load()
        return orientation
    image.getexif()[ORIENTATION] = orientation
    image.load()
    return int(image.getexif().get(ORIENTATION, 1))


def _ppm_max(image: ImageFile.ImageFile) -> int:
    if image.format != "PPM" or not image.tile or not isinstance(image.tile[0][3], tuple):
        return 0
    most = image.tile[0][3][-1]
    return most if isinstance(most, int) else 0


def _ppm_levels(image: ImageFile.ImageFile, content: bytes) -> Image.Image | Levels:
    """Decode a binary PPM of other than 8 bits, which Pillow reads byte by byte in Python."""
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
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    found = tags.get(tag, ())
    values = found if isinstance(found, tuple) else (found,)
    return tuple(value for value in values if isinstance(value, int))


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert to L or RGB in sRGB; without ICC profile, an image counts as sRGB.

    The second result is ``""``, ``"profiles"`` if it was converted, or ``"damaged_profiles"``.
    """
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab()) or image, ""
    found = changes_colors(profile, image.mode)
    if found == "profiles" and (transform := _transform(profile, image.mode)):
        return _applied(transform, image), found
    return (image.convert("RGB") if image.mode == "CMYK" else image), found


def changes_colors(profile: bytes, mode: str) -> str:
    """Return what :func:`to_srgb` would return besides an image of that mode."""
    if not profile or mode not in _SPACES:
        return ""
    try:
        return "" if _transform(profile, mode) is None else "profiles"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "damaged_profiles"


def onto(levels: Levels, alpha: Levels, background: Color) -> Levels:
    """Composite [H, W, C] with ``alpha`` [H, W, 1] on a background (RGB if not gray), in sRGB."""
    most = int(np.iinfo(levels.dtype).max)
    behind = np.array(background, dtype=np.uint32) * np.uint32(most // 255)
    if levels.shape[2] == 1 and len(set(background)) == 1:  # gray
        behind = behind[:1]
    opacity = alpha.astype(np.uint32)
    # At most 65,535² + 32,767, which 32 bits hold.
    mixed = levels.astype(np.uint32) * opacity + behind * (most - opacity) + np.uint32(most // 2)
    mixed //= np.uint32(most)
    return mixed.astype(levels.dtype)


def with_channels(levels: Levels, channels: int) -> Levels:
    """Convert gray to RGB by repetition, or RGB to gray by ITU-R 601 luma: [H, W, channels]."""
    if levels.shape[2] == channels:
        return levels
    if channels == 3:
        return np.repeat(levels, 3, axis=2)
    luma = (levels.astype(np.uint32) @ _LUMA + np.uint32(0x8000)) >> np.uint32(16)
    return luma[..., None].astype(levels.dtype)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB; None if it changes nothing. Raises ValueError or PyCMSError."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space != _SPACES[mode] and (mode, space) != ("L", "RGB"):
        raise ValueError(space)
    # For gray, a precalculated table has few steps: 10 levels off where the curve is steep.
    precision = ImageCms.Flags.NOOPTIMIZE if space == "GRAY" else ImageCms.Flags.HIGHRESPRECALC
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        "RGB" if space == "RGB" else mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION | precision,
    )
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, _GRID if mode == "RGB" else 256).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(steps[None])
    moved = np.asarray(_applied(transform, probe)).astype(int) - np.asarray(probe)
    return None if np.abs(moved).max() <= _SAME_LEVELS else transform


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    was_gray = image.mode == "L"
    if was_gray and transform.input_mode == "RGB":
        image = image.convert("RGB")
    converted = transform.apply(image)
    # For gray, the three channels differ only by rounding.
    return converted.getchannel("G") if was_gray else converted
