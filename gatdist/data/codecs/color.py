"""Colours: ICC profiles to sRGB, transparency onto a background, colour to gray."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Levels = NDArray[Any]  # uint8 or uint16 [H, W, C]
Color = tuple[int, int, int]  # 8 bits each, sRGB

# A profile that moves no colour of a grid by more levels than this is sRGB under whatever name.
_SAME_LEVELS = 2
_GRID = 17
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601, in 65,536ths, as Pillow's


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert to sRGB by the relative colorimetric intent with black point compensation.

    Args:
        image: of mode L, RGB, CMYK or LAB.
        profile: ICC; empty for none, which means sRGB (for CMYK, Pillow's plain formula).

    Returns:
        The image, L or RGB, and ``""``, ``"profiles"`` if it was converted, or
        ``"damaged_profiles"`` if the profile can't be used, so that the image was taken for sRGB.
    """
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab()) or image, ""
    found = ""
    if profile:
        try:
            transform = _transform(profile, image.mode)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            found = "damaged_profiles"
        else:
            if transform is not None:
                return _applied(transform, image), "profiles"
    return (image.convert("RGB") if image.mode == "CMYK" else image), found


def changes_colors(profile: bytes, mode: str) -> str:
    """What :func:`to_srgb` would return beside an image of that mode."""
    if not profile or mode not in _SPACES:
        return ""
    try:
        return "" if _transform(profile, mode) is None else "profiles"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "damaged_profiles"


def onto(levels: Levels, alpha: Levels, background: Color) -> Levels:
    """Composite on a background, in sRGB's own levels, as browsers do.

    Args:
        levels: [H, W, 1 or 3].
        alpha: [H, W, 1], of the same dtype.
        background: what shows where alpha is 0.

    Returns:
        [H, W, C], C being 3 where the background has a colour.
    """
    most = int(np.iinfo(levels.dtype).max)
    behind = np.array(background, dtype=np.uint32) * np.uint32(most // 255)
    if levels.shape[2] == 1 and is_gray(background):
        behind = behind[:1]
    opacity = alpha.astype(np.uint32)
    # At most 65,535² + 32,767, which 32 bits hold.
    mixed = levels.astype(np.uint32) * opacity + behind * (most - opacity) + np.uint32(most // 2)
    mixed //= np.uint32(most)
    return mixed.astype(levels.dtype)


def with_channels(levels: Levels, channels: int) -> Levels:
    """Gray to RGB by repetition, RGB to gray by ITU-R 601's luma: [H, W, channels]."""
    if levels.shape[2] == channels:
        return levels
    if channels == 3:
        return np.repeat(levels, 3, axis=2)
    luma = (levels.astype(np.uint32) @ _LUMA + np.uint32(0x8000)) >> np.uint32(16)
    return luma[..., None].astype(levels.dtype)


def is_gray(color: Color) -> bool:
    """Whether a colour has none."""
    return len(set(color)) == 1


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts such images to sRGB; None where that changes nothing.

    Raises:
        ValueError: the profile is of another kind than the image.
        ImageCms.PyCMSError: it is damaged.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space != _SPACES[mode] and (mode, space) != ("L", "RGB"):
        raise ValueError(space)
    # Of gray, a table of few steps would be made, which is 10 levels off where the curve is steep.
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
    if image.mode == "L" and transform.input_mode == "RGB":
        image, was_gray = image.convert("RGB"), True
    else:
        was_gray = image.mode == "L"
    converted = transform.apply(image)
    # Of gray all three channels are the same, but for rounding.
    return converted.getchannel("G") if was_gray else converted
