"""Crops, resizes and stores pictures.

The transforms are called as in the tools of ADM (Dhariwal & Nichol 2021, ``image_datasets.py``) and
EDM (Karras et al. 2022, ``dataset_tool.py``), and do the same to a picture. Of Pillow's filters,
``lanczos`` is EDM's; all of them look at every pixel of the source that a target pixel covers.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gatdist.data.codecs import CodecError, decode_image

# Component of each of Pillow's formats that is stored as it is, and the formats to choose from.
_COMPONENTS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm"}
FORMATS: Mapping[str, str | None] = {"keep": None, "png": "png", "jpeg": "jpg", "webp": "webp"}

_MODES = {1: "L", 3: "RGB"}
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
_ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright, from 5 on width and height change places
_JPEG_QUALITY = 95

Pixels = NDArray[np.uint8]


class Header(NamedTuple):
    """What a picture's file says before its pixels are decoded.

    Attributes:
        height: in pixels, when upright.
        width: in pixels, when upright.
        component: extension for what it really is; "" where it can't be stored as it is.
        is_gray: has one channel, or one and transparency.
        is_upright: EXIF does not turn it.
    """

    height: int
    width: int
    component: str
    is_gray: bool
    is_upright: bool


def read_header(content: bytes) -> Header:
    """Read a picture's header. Raises CodecError if it is none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            has_exif = "exif" in image.info or "Raw profile type exif" in image.info
            orientation = image.getexif().get(_ORIENTATION, 1) if has_exif else 1
            width, height = image.size[::-1] if orientation >= 5 else image.size
            component = _COMPONENTS.get(image.format or "", "")
            return Header(height, width, component, image.mode in _GRAY_MODES, orientation <= 1)
    except UnidentifiedImageError:
        raise CodecError("is no picture of a known format") from None
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise CodecError(f"is no readable picture ({' '.join(str(error).split())})") from error


def center_crop(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """The largest part about the centre with the aspect of height × width, resized to it."""
    found_height, found_width = pixels.shape[:2]
    part_height = min(found_height, max(1, round(found_width * height / width)))
    part_width = min(found_width, max(1, round(found_height * width / height)))
    top, left = (found_height - part_height) // 2, (found_width - part_width) // 2
    part = pixels[top : top + part_height, left : left + part_width]
    return stretch(part, height, width, resample)


def center_crop_wide(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """:func:`center_crop`, with black above and below to make it width × width."""
    part = center_crop(pixels, height, width, resample)
    canvas = np.zeros((width, width, pixels.shape[2]), dtype=np.uint8)
    top = (width - height) // 2
    canvas[top : top + height] = part
    return canvas


def center_crop_dhariwal(
    pixels: Pixels, height: int, width: int, resample: Image.Resampling
) -> Pixels:
    """ADM's: halved by a box filter as often as possible, resized by bicubic, and cropped."""
    del width, resample
    image = _image(pixels)
    while min(image.size) >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = height / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    resized = _pixels(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - height) // 2
    return resized[top : top + height, left : left + height]


def stretch(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """The whole picture resized to height × width, whatever its aspect was."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return _pixels(_image(pixels).resize((width, height), resample))


Transform = Callable[[Pixels, int, int, Image.Resampling], Pixels]
TRANSFORMS: Mapping[str, Transform] = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
    "stretch": stretch,
}


def encode(pixels: Pixels, component: str, quality: int | None) -> bytes:
    """A file of uint8 [H, W, C], C being 1 or 3.

    Args:
        pixels: to store.
        component: ``png``, ``jpg`` or ``webp``.
        quality: 1 to 100; None for 95 in JPEG, whose colours are never subsampled, and for lossless
            WebP.
    """
    if component == "jpg":
        space, sampling = ("GRAY", "Gray") if pixels.shape[2] == 1 else ("RGB", "444")
        content: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=quality or _JPEG_QUALITY,
            colorspace=space,
            colorsubsampling=sampling,
        )
        return content
    file = io.BytesIO()
    image = _image(pixels)
    if component == "webp" and quality:
        image.save(file, "WEBP", quality=quality)
    elif component == "webp":  # the least effort: smaller than PNG and quicker, and still lossless
        image.save(file, "WEBP", lossless=True, quality=0, method=0)
    else:  # of pictures, runs alone make a file as small as zlib's default does in 2.5 × the time
        image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def decode(content: bytes, header: Header, channels: int) -> Pixels:
    """Upright pixels, uint8 [H, W, channels]. Raises CodecError."""
    return decode_image(content, (channels, header.height, header.width))


def _image(pixels: Pixels) -> Image.Image:
    array: Any = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(array))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image).reshape(image.height, image.width, -1)
