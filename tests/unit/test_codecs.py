"""Codecs of images, labels and arrays."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from decoding import decode_image
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.images import decode_image_into, encode_png
from gatdist.data.codecs.labels import decode_label

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
SHAPE = (3, 6, 10)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    """Return an image that JPEG and resizing change little."""
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([255 * y / height, 255 * x / width, 0 * x + 128], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]))))
def test_png_round_trip(pixels: np.ndarray) -> None:
    height, width, channels = pixels.shape
    content = encode_png(pixels)
    assert (decode_image(content, (channels, height, width)) == pixels).all()
    assert (decode_image(memoryview(content), (channels, height, width)) == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "PPM"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (decode_image(saved(Image.fromarray(RGB), kind, **options), SHAPE) == RGB).all()


def test_gray_and_rgb_are_converted_to_each_other() -> None:
    assert (decode_image(saved(Image.fromarray(GRAY)), SHAPE) == GRAY[..., None]).all()
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    found = decode_image(saved(Image.fromarray(RGB)), (1, 6, 10))[..., 0]
    assert np.abs(found - luma).max() <= 1
    jpeg = saved(smooth(16, 24).convert("L"), "JPEG", quality=95)
    assert np.ptp(decode_image(jpeg, (3, 16, 24)), axis=2).max() == 0


def test_palettes_and_one_bit_images() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    assert (decode_image(saved(palette), SHAPE) == np.asarray(palette.convert("RGB"))).all()
    bits = Image.fromarray(GRAY > 127)
    assert (decode_image(saved(bits), (1, 6, 10))[..., 0] == np.where(GRAY > 127, 255, 0)).all()


def test_transparent_images_are_composited_on_white() -> None:
    alpha = RNG.integers(0, 256, (6, 10, 1), dtype=np.uint8)
    content = saved(Image.fromarray(np.concatenate([RGB, alpha], axis=2)))
    opacity = alpha / 255
    expected = RGB * opacity + 255 * (1 - opacity)
    assert np.abs(decode_image(content, SHAPE) - expected).max() <= 0.5 + 1e-9
    both = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(alpha[..., 0])])
    expected = (GRAY[..., None] * opacity + 255 * (1 - opacity))[..., 0]
    found = decode_image(saved(both), (1, 6, 10))[..., 0]
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def png16(levels: np.ndarray) -> bytes:
    """Return a PNG of 16 bits per channel: [H, W] gray or [H, W, 3] RGB."""
    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if levels.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def test_of_sixteen_bits_the_upper_eight_are_used() -> None:
    gray = RNG.integers(0, 2**16, (6, 10), dtype=np.uint16)
    assert (decode_image(png16(gray), (1, 6, 10))[..., 0] == gray >> 8).all()
    rgb = RNG.integers(0, 2**16, (6, 10, 3), dtype=np.uint16)
    assert (decode_image(png16(rgb), SHAPE) == rgb >> 8).all()
    pgm = b"P5 10 6 65535\n" + gray.astype(">u2").tobytes()
    assert (decode_image(pgm, (1, 6, 10))[..., 0] == gray >> 8).all()


def test_cmyk() -> None:
    image = smooth(16, 24)
    content = saved(image.convert("CMYK"), "JPEG", quality=95)
    found = decode_image(content, (3, 16, 24)).astype(int)
    assert np.abs(found - np.asarray(image)).max() < 12


def test_first_image_of_an_animation_is_decoded() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    content = saved(first, "PNG", save_all=True, append_images=[second])
    assert (decode_image(content, SHAPE) == RGB).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(smooth(16, 24), kind, exif=exif, quality=95)
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }[orientation](np.asarray(smooth(16, 24)).astype(int))
    found = decode_image(content, (3, *turned.shape[:2]))
    assert np.abs(found - turned).max() < 16


def test_jpeg_is_decoded_as_by_simplejpeg_and_pillow() -> None:
    content = simplejpeg.encode_jpeg(np.asarray(smooth(32, 48)), quality=90)
    found = decode_image(content, (3, 32, 48))
    assert (found == simplejpeg.decode_jpeg(content)).all()
    assert np.abs(found.astype(int) - np.asarray(Image.open(io.BytesIO(content)))).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(40, 40), (16, 64), (90, 24), (24, 24), (5, 7)])
def test_other_size_is_cropped_and_resized(kind: str, size: tuple[int, int]) -> None:
    content = saved(smooth(*size), kind, quality=98)
    found = decode_image(content, (3, 24, 24), resize="box").astype(int)
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = np.asarray(smooth(*size))[top : top + side, left : left + side]
    expected = np.asarray(Image.fromarray(cut).resize((24, 24), Image.Resampling.BOX)).astype(int)
    assert np.abs(found - expected).mean() < 6


def test_without_a_filter_other_size_is_rejected() -> None:
    with pytest.raises(CodecError):
        decode_image(saved(Image.fromarray(RGB)), (3, 8, 10))


BAD = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "cut png": encode_png(RGB)[:90],
    "cut jpeg": simplejpeg.encode_jpeg(np.ascontiguousarray(RGB))[:-150],
    "jpeg's head": b"\xff\xd8\xff\xe0",
}


@pytest.mark.parametrize("name", BAD)
def test_content_that_is_no_image_is_rejected(name: str) -> None:
    with pytest.raises(CodecError):
        decode_image(BAD[name], SHAPE)


def test_decompression_bomb_is_rejected_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb += struct.pack(">I", 9) + b"IDAT" + bytes(13)
    with pytest.raises(CodecError):
        decode_image(bomb, (3, 8, 8), resize="box")


@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, 2))
def test_any_damage_raises_a_codec_error(noise: bytes, at: int, which: int) -> None:
    whole = [
        encode_png(RGB),
        simplejpeg.encode_jpeg(np.ascontiguousarray(RGB)),
        saved(Image.fromarray(RGB), "WEBP"),
    ][which]
    out = np.empty((6, 10, 3), np.uint8)
    for content in (noise, whole[:at] + noise, whole[:at] + noise + whole[at + len(noise) :]):
        try:
            decode_image_into(content, out)
        except CodecError:
            continue


@pytest.mark.parametrize(
    ("content", "field", "label"),
    [(b"7", "", 7), (b" 3\n", "", 3), (b'{"label": 4, "x": "y"}', "label", 4), (b"09", "", 9)],
)
def test_labels(content: bytes, field: str, label: int) -> None:
    assert decode_label(content, 10, field) == label


@pytest.mark.parametrize(
    ("content", "field", "fact"),
    [
        (b"10", "", "class 10"),
        (b"-1", "", ""),
        (b"cat", "", "'cat'"),
        (b"", "", ""),
        (b"1_0", "", "'1_0'"),
        ("٣".encode(), "", "'٣'"),
        (b"\xff", "", "UTF-8"),
        (b"{}", "label", ""),
        (b"[1]", "label", "JSON"),
        (b"{", "label", "JSON"),
        (b'{"label": null}', "label", ""),
    ],
)
def test_invalid_labels_are_rejected(content: bytes, field: str, fact: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode_label(content, 10, field)
    assert fact in str(caught.value)
