"""Crop, resize and encode images.

The transforms are named after, and compute the same as, the tools of ADM (Dhariwal & Nichol 2021,
``image_datasets.py``) and EDM (Karras et al. 2022, ``dataset_tool.py``; its filter is ``lanczos``).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from gatdist.data.codecs.images import change_image, encode_png

# Extensions of Pillow's formats that every reader of WebDataset opens, and that may be stored
# unchanged; and the formats to choose from.
STORED: Mapping[str, str] = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS: Mapping[str, str | None] = {"keep": None, "png": "png", "jpeg": "jpg", "webp": "webp"}

_JPEG_QUALITY = 95
_DEEP_COMPRESSION = 3  # of PNG of 16 bits; more takes twice the time for a few percent

Pixels = NDArray[Any]  # uint8 or uint16 [H, W, C]


def center_crop(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """The largest central part with the aspect of height × width, resized to it."""
    found_height, found_width = pixels.shape[:2]
    part_height = min(found_height, max(1, round(found_width * height / width)))
    part_width = min(found_width, max(1, round(found_height * width / height)))
    top, left = (found_height - part_height) // 2, (found_width - part_width) // 2
    part = pixels[top : top + part_height, left : left + part_width]
    return stretch(part, height, width, resample)


def center_crop_wide(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """:func:`center_crop`, with black above and below to make it width × width."""
    part = center_crop(pixels, height, width, resample)
    canvas = np.zeros((width, width, pixels.shape[2]), dtype=pixels.dtype)
    top = (width - height) // 2
    canvas[top : top + height] = part
    return canvas


def center_crop_dhariwal(
    pixels: Pixels, height: int, width: int, resample: Image.Resampling
) -> Pixels:
    """ADM's: halved by a box filter as often as possible, resized by bicubic, and cropped."""
    del width, resample
    resized = pixels
    while min(resized.shape[:2]) >= 2 * height:
        resized = _resized(
            resized, resized.shape[0] // 2, resized.shape[1] // 2, Image.Resampling.BOX
        )
    scale = height / min(resized.shape[:2])
    size = round(resized.shape[0] * scale), round(resized.shape[1] * scale)
    resized = _resized(resized, *size, Image.Resampling.BICUBIC)
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - height) // 2
    return resized[top : top + height, left : left + height]


def stretch(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """The whole image resized to height × width, whatever its aspect."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return _resized(pixels, height, width, resample)


Transform = Callable[[Pixels, int, int, Image.Resampling], Pixels]
TRANSFORMS: Mapping[str, Transform] = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
    "stretch": stretch,
}


def encode(pixels: Pixels, component: str, quality: int | None) -> bytes:
    """Encode uint8 [H, W, C], C being 1 or 3, as ``png`` (also uint16), ``jpg`` or ``webp``.

    ``quality`` is 1 to 100; None is 95 for JPEG, whose colours are never subsampled, and lossless
    for WebP.
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
    if pixels.itemsize == 2:
        return encode_png(pixels, compression=_DEEP_COMPRESSION)
    file = io.BytesIO()
    image = _image(pixels)
    if component == "webp" and quality:
        image.save(file, "WEBP", quality=quality)
    elif component == "webp":  # the least effort: smaller than PNG and quicker, and still lossless
        image.save(file, "WEBP", lossless=True, quality=0, method=0)
    else:  # run lengths alone are as small as zlib's default, 2.5 × as fast
        image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def _resized(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    return change_image(pixels, lambda image: image.resize((width, height), resample))


def _image(pixels: Pixels) -> Image.Image:
    array: Any = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(array))
