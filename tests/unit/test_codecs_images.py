"""Images of cameras, phones and other programs: EXIF, alpha, profiles, 16 bits."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, features

from decoding import decode_image
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.formats import exif_orientation
from gatdist.data.codecs.images import (
    decode_image_into,
    decode_pixels,
    encode_png,
    read_image_header,
    read_image_shape,
)

RNG = np.random.default_rng(0)
TAG = 0x0112


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([255 * y / height, 255 * x / width, 0 * x + 128], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def noise(height: int, width: int, *channels: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def ifd(*entries: tuple[int, int, int, bytes], order: str = "<", count: int | None = None) -> bytes:
    """Return a TIFF header and IFD0 with entries of tag, type, count and 4 bytes of value."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    body = b"".join(struct.pack(f"{order}HHI", *e[:3]) + e[3].ljust(4, b"\0") for e in entries)
    return head + struct.pack(f"{order}H", len(entries) if count is None else count) + body


def short(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return TAG, 3, 1, struct.pack(f"{order}H", value)


def segment(marker: int, body: bytes, fill: int = 0) -> bytes:
    return b"\xff" * fill + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def exif(value: int, order: str = "<") -> bytes:
    return b"Exif\0\0" + ifd(short(value, order), order=order) + bytes(4)


def segments(jpeg: bytes) -> tuple[list[bytes], bytes]:
    """Return the segments before the first scan, and the scan with the rest of the file."""
    parts, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        parts.append(jpeg[at:end])
        at = end
    return parts, jpeg[at:]


def joined(parts: list[bytes], scan: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(parts) + scan


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    return {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }[orientation](pixels)


# Orientation


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", [0, 1, 3, 6, 8, 9, 255, 65535])
def test_orientation_is_1_to_8_or_upright_in_both_byte_orders(value: int, order: str) -> None:
    expected = value if 1 <= value <= 8 else 1
    assert exif_orientation(exif(value, order)) == expected
    assert exif_orientation(exif(value, order).removeprefix(b"Exif\0\0")) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 1),
        (b"Exif\0\0", 1),
        (b"Exif\0\0II*\0", 1),
        (b"XX*\0" + ifd(short(6))[4:], 1),
        (ifd((TAG, 4, 1, struct.pack("<I", 6))), 6),  # LONG, which Pillow reads, too
        (ifd((TAG, 9, 1, struct.pack("<i", -6))), 1),
        (ifd((TAG, 3, 2, struct.pack("<HH", 6, 6))), 1),
        (ifd((TAG, 3, 0, struct.pack("<H", 6))), 1),
        (ifd((TAG, 2, 2, b"6\0")), 1),
        (ifd((TAG, 7, 1, b"\6")), 1),
        (ifd((TAG, 77, 1, b"\6")), 1),
        (ifd(short(6), count=65535), 6),  # the directory is truncated after the tag
        (ifd((0x0100, 3, 1, b"\1\0"), short(8)), 8),
        (ifd(short(8))[:-3], 1),
        (b"II*\0" + struct.pack("<I", 2**32 - 1), 1),
        (b"II*\0" + struct.pack("<I", 0) + bytes(40), 1),
        # IFD1, of the thumbnail, has another one.
        (ifd((0x0100, 3, 1, b"\1\0")) + struct.pack("<I", 26) + ifd(short(6))[8:], 1),
    ],
)
def test_orientation_of_malformed_exif_is_defined(data: bytes, expected: int) -> None:
    assert exif_orientation(data) == expected


@given(st.binary(max_size=200))
def test_orientation_of_any_bytes_is_1_to_8(data: bytes) -> None:
    for head in (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        assert exif_orientation(head + data) in range(1, 9)


def test_orientation_9_and_0_do_not_change_pixels() -> None:
    plain = simplejpeg.encode_jpeg(np.asarray(smooth(40, 60)))
    parts, scan = segments(plain)
    for value in (0, 9, 65535):
        content = joined([segment(0xE1, exif(value)), *parts], scan)
        assert read_image_shape(content) == (3, 40, 60)
        assert (decode_image(content, (3, 40, 60)) == decode_image(plain, (3, 40, 60))).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10),
    st.randoms(use_true_random=False),
    st.sampled_from(["<", ">"]),
    st.sampled_from([(16, 24), (16, 16), (17, 9)]),
)
def test_orientation_of_jpegs_with_shuffled_segments(
    value: int, random: Any, order: str, size: tuple[int, int]
) -> None:
    """For any order of segments, header, fast path, resizing and Pillow agree."""
    plain = simplejpeg.encode_jpeg(np.asarray(smooth(*size)), quality=95)
    parts, scan = segments(plain)
    others = [
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
        segment(0xE5, bytes(random.choice([10, 60_000]))),
        segment(0xFE, b"a comment"),
    ]
    first = parts[:1] if parts[0][1] == 0xE0 else []
    rest = [*parts[len(first) :], *random.sample(others, random.randrange(4))]
    rest.append(segment(0xE1, exif(value, order), fill=random.randrange(3)))
    random.shuffle(rest)
    content = joined([*first, *rest], scan)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    header = read_image_header(content)
    shape = (3, *expected.shape[:2])
    assert (3, header.height, header.width) == read_image_shape(content) == shape
    assert (decode_image(content, shape) == expected).all()
    assert (decode_pixels(content, 3).pixels == expected).all()
    small = decode_image(content, (3, 8, 8), resize="box")
    assert (small == decode_image(encode_png(expected.copy()), (3, 8, 8), resize="box")).all()


def test_orientation_after_the_frame_and_other_segments() -> None:
    image = np.asarray(smooth(24, 40))
    plain = simplejpeg.encode_jpeg(image, quality=95)
    parts, scan = segments(plain)
    much = [segment(0xE4, bytes(65_000)) for _ in range(3)]
    for content in (
        joined([*parts, segment(0xE1, exif(3))], scan),
        joined([*much, *parts, segment(0xE1, exif(3), fill=5)], scan),
        joined([parts[0], *much, segment(0xE1, exif(3)), *parts[1:]], scan),
    ):
        found = decode_image(content, (3, 24, 40))
        assert (found == turned(decode_image(plain, (3, 24, 40)), 3)).all()


def test_orientation_of_the_first_of_two_exif_segments_applies() -> None:
    parts, scan = segments(simplejpeg.encode_jpeg(np.asarray(smooth(16, 24))))
    two = [segment(0xE1, exif(6)), segment(0xE1, exif(3))]
    assert read_image_shape(joined([*two, *parts], scan)) == (3, 24, 16)
    assert read_image_shape(joined([*two[::-1], *parts], scan)) == (3, 16, 24)


def test_orientation_in_xmp_alone_is_ignored() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    parts, scan = segments(simplejpeg.encode_jpeg(np.asarray(smooth(16, 24))))
    jpeg = joined([segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp), *parts], scan)
    assert decode_image(jpeg, (3, 16, 24)).shape == (16, 24, 3)
    tiff = saved(smooth(16, 24), "TIFF", tiffinfo={700: xmp})
    assert (decode_image(tiff, (3, 16, 24)) == np.asarray(smooth(16, 24))).all()


KINDS = ["PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_orientation_of_other_formats(kind: str, orientation: int) -> None:
    tags = Image.Exif()
    tags[TAG] = orientation
    options = {} if kind == "AVIF" else {"lossless": True}
    content = saved(smooth(16, 24), kind, exif=tags, **options)
    expected = turned(np.asarray(smooth(16, 24)), orientation)
    assert read_image_shape(content) == (3, *expected.shape[:2])
    found = decode_pixels(content, 3).pixels.astype(int)
    assert np.abs(found - expected).max() <= (16 if kind == "AVIF" else 0)


def test_orientation_of_a_png_after_its_pixels() -> None:
    content = encode_png(np.asarray(smooth(16, 24)))
    body = exif(6).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + body))
    content = content[:-12] + chunk + content[-12:]
    assert read_image_shape(content) == (3, 24, 16)
    assert (decode_image(content, (3, 24, 16)) == turned(np.asarray(smooth(16, 24)), 6)).all()


# Transparency


def over(pixels: NDArray[Any], alpha: NDArray[Any], background: tuple[int, ...]) -> NDArray[Any]:
    opacity = alpha[..., None] / 255
    return pixels * opacity + np.array(background) * (1 - opacity)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_images_show_the_background(kind: str, background: tuple[int, ...]) -> None:
    rgba = noise(6, 10, 4)
    rgba[:2, :, 3], rgba[2:4, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = saved(Image.fromarray(rgba), kind, **options)
    assert read_image_header(content).has_alpha
    found = decode_pixels(content, 3, background=background)  # type: ignore[arg-type]
    assert np.abs(found.pixels - over(rgba[..., :3], rgba[..., 3], background)).max() <= 0.51
    assert (found.pixels[:2] == background).all(), "the color under alpha 0 does not show"
    assert "transparent" in found.remarks


def test_transparent_gray_on_a_colored_background() -> None:
    gray, alpha = noise(6, 10), noise(6, 10)
    content = saved(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]))
    assert read_image_header(content).is_gray
    found = decode_pixels(content, 3, background=(255, 0, 0)).pixels
    expected = over(np.repeat(gray[..., None], 3, 2), alpha, (255, 0, 0))
    assert np.abs(found - expected).max() <= 0.51
    assert decode_pixels(content, 1).pixels.shape == (6, 10, 1)


def test_transparent_palettes_and_color_keys() -> None:
    rgb = noise(6, 10, 3)
    palette = Image.fromarray(rgb).quantize(8)
    content = saved(palette, transparency=3)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 3] = 255
    assert (decode_image(content, (3, 6, 10)) == expected).all()
    some = saved(palette, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    assert "transparent" in decode_pixels(some, 3).remarks
    rgb[2, 3] = 9, 8, 7
    found = decode_image(saved(Image.fromarray(rgb), transparency=(9, 8, 7)), (3, 6, 10))
    rgb[2, 3] = 255
    assert (found == rgb).all()
    gray = Image.fromarray(np.array([[0, 5], [255, 7]], np.uint8))
    assert decode_image(saved(gray, transparency=5), (1, 2, 2))[..., 0].tolist() == [
        [0, 255],
        [255, 7],
    ]


@pytest.mark.parametrize(("depth", "key"), [(1, 0), (2, 1), (4, 9)])
def test_transparent_color_key_of_few_bits(depth: int, key: int) -> None:
    levels = np.arange(2**depth)
    bits = "".join(f"{level:0{depth}b}" for level in levels).ljust(8, "0")
    row = b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0)
    chunks = [("IHDR", header), ("tRNS", struct.pack(">H", key)), ("IDAT", zlib.compress(row))]
    expected = levels * 255 // (2**depth - 1)
    expected[key] = 128
    found = decode_pixels(png(chunks), 1, background=(128, 128, 128)).pixels
    assert found[0, :, 0].tolist() == expected.tolist()


def test_opaque_alpha_is_not_transparent() -> None:
    rgba = noise(6, 10, 4)
    rgba[..., 3] = 255
    found = decode_pixels(saved(Image.fromarray(rgba)), 3)
    assert (found.pixels == rgba[..., :3]).all()
    assert not found.remarks


# Profiles


def gray_profile(gamma: float) -> bytes:
    """Return a gray profile of ICC version 2 with one gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78)
    tags, at = b"", 128 + 4 + 36
    body = b""
    for name, value in ((b"desc", text), (b"wtpt", white), (b"kTRC", curve)):
        value = value.ljust(-(-len(value) // 4) * 4, b"\0")
        tags += name + struct.pack(">II", at + len(body), len(value))
        body += value
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + tags + body


def rgb_profile(gamma: float) -> bytes:
    """Return SRGB's colors with another gamma: its curves are replaced."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    for i in range(count):
        name, at, _ = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
            profile[at : at + len(curve)] = curve
            struct.pack_into(">I", profile, 132 + 12 * i + 8, len(curve))
    return bytes(profile)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded_srgb(linear: NDArray[Any]) -> NDArray[Any]:
    low = linear * 12.92
    return 255 * np.where(linear <= 0.0031308, low, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_profiles_are_converted_to_srgb(kind: str) -> None:
    """With a gamma of 1, levels are linear: the standard's formula gives the expected result."""
    image = smooth(16, 32)
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    content = saved(image, kind, icc_profile=rgb_profile(1.0), **options)
    assert read_image_header(content).profile == "profiles"
    found = decode_pixels(content, 3)
    expected = encoded_srgb(np.asarray(image) / 255)
    # JPEG changes levels by 2, which the curve amplifies where it is steep.
    bright = np.asarray(image) > 40
    assert np.abs(found.pixels - expected)[bright].max() <= (8 if kind == "JPEG" else 2)
    assert found.remarks == {"profiles": ""}
    assert (decode_image(content, (3, 16, 32)) == found.pixels).all()


def test_profiles_of_gray_images_are_converted() -> None:
    ramp = np.arange(256, dtype=np.uint8)[None]
    found = decode_pixels(saved(Image.fromarray(ramp), icc_profile=gray_profile(1.0)), 1)
    assert found.remarks == {"profiles": ""}
    assert np.abs(found.pixels[..., 0] - encoded_srgb(ramp / 255)).max() <= 2
    rgb = decode_pixels(saved(Image.fromarray(ramp), icc_profile=rgb_profile(1.0)), 1)
    assert np.abs(rgb.pixels[..., 0] - encoded_srgb(ramp / 255)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_profiles_of_srgb_change_nothing(kind: str) -> None:
    plain, tagged = saved(smooth(16, 24), kind), saved(smooth(16, 24), kind, icc_profile=SRGB)
    found = decode_pixels(tagged, 3)
    assert (found.pixels == decode_pixels(plain, 3).pixels).all()
    assert not found.remarks


@pytest.mark.parametrize("profile", [b"x" * 200, SRGB[:300], SRGB[:128] + bytes(99), b""])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_damaged_profiles_are_reported_and_treated_as_srgb(kind: str, profile: bytes) -> None:
    plain = decode_pixels(saved(smooth(16, 24), kind), 3).pixels
    content = saved(smooth(16, 24), kind, icc_profile=profile)
    found = decode_pixels(content, 3)
    assert (found.pixels == plain).all()
    assert (decode_image(content, (3, 16, 24)) == plain).all()
    assert found.remarks == ({"damaged_profiles": ""} if profile else {})


def test_profiles_of_another_color_space_count_as_damaged() -> None:
    content = saved(smooth(16, 24), icc_profile=gray_profile(2.2))
    assert decode_pixels(content, 3).remarks == {"damaged_profiles": ""}


def test_profiles_in_parts_and_out_of_order() -> None:
    parts, scan = segments(saved(smooth(16, 24), "JPEG", quality=95))
    profile = rgb_profile(1.0)
    half = len(profile) // 2
    two = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + body)
        for number, body in ((1, profile[:half]), (2, profile[half:]))
    ]
    right, swapped, torn = (
        decode_pixels(joined([*chosen, *parts], scan), 3) for chosen in (two, two[::-1], two[:1])
    )
    assert right.remarks == {"profiles": ""}
    assert (right.pixels == swapped.pixels).all()
    assert torn.remarks == {"damaged_profiles": ""}


def test_lab_and_cmyk_are_converted_to_srgb() -> None:
    lab = Image.new("LAB", (4, 4), (255 * 50 // 100, 128, 128))  # L* of 50: a middle gray
    found = decode_image(saved(lab, "TIFF"), (3, 4, 4))
    assert np.abs(found.astype(int) - 119).max() <= 3
    cmyk = smooth(16, 24).convert("CMYK")
    for kind in ("TIFF", "JPEG"):
        found = decode_image(saved(cmyk, kind, quality=98), (3, 16, 24)).astype(int)
        assert np.abs(found - np.asarray(smooth(16, 24))).max() < 12


# 16 bits


def png(chunks: list[tuple[str, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body))
        + kind.encode()
        + body
        + struct.pack(">I", zlib.crc32(kind.encode() + body))
        for kind, body in [*chunks, ("IEND", b"")]
    )


def png16(levels: NDArray[Any], *more: tuple[str, bytes]) -> bytes:
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png([("IHDR", header), *more, ("IDAT", zlib.compress(rows))])


def tiff16(levels: NDArray[Any], order: str, photometric: int = 2, bits: int = 16) -> bytes:
    """Return an uncompressed TIFF with one strip."""
    height, width, channels = levels.shape
    data = levels.astype(f"{order}u2").tobytes()
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    extra = [(338, 3, 1, struct.pack(f"{order}H", 2))] if channels == 4 else []
    count = 9 + len(extra)
    after = 8 + 2 + 12 * count + 4
    bit_value = depths if channels < 3 else struct.pack(f"{order}I", after)

    def long(value: int) -> bytes:
        return struct.pack(f"{order}I", value)

    def word(value: int) -> bytes:
        return struct.pack(f"{order}H", value)

    entries = [
        (256, 4, 1, long(width)),
        (257, 4, 1, long(height)),
        (258, 3, channels, bit_value),
        (259, 3, 1, word(1)),
        (262, 3, 1, word(photometric)),
        (273, 4, 1, long(after + len(depths))),
        (277, 3, 1, word(channels)),
        (278, 4, 1, long(height)),
        (279, 4, 1, long(len(data))),
        *extra,
    ]
    return ifd(*entries, order=order) + bytes(4) + depths + data


def levels16(*shape: int) -> NDArray[np.uint16]:
    return RNG.integers(0, 2**16, shape, dtype=np.uint16)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_kept_in_png(channels: int) -> None:
    levels = levels16(6, 10, channels)
    for content in (png16(levels), encode_png(levels), encode_png(levels, compression=6)):
        assert read_image_header(content).bits == 16
        found = decode_pixels(content, channels, bits=16)
        assert found.pixels.dtype == np.uint16
        assert (found.pixels == levels).all()
        out = np.empty(levels.shape, np.uint16)
        decode_image_into(content, out)
        assert (out == levels).all()
        assert (decode_image(content, (channels, 6, 10)) == levels >> 8).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_kept_in_tiff_of_both_byte_orders(channels: int, order: str) -> None:
    levels = levels16(6, 10, channels)
    content = tiff16(levels, order, photometric=2 if channels == 3 else 1)
    assert (decode_pixels(content, channels, bits=16).pixels == levels).all()
    assert (decode_pixels(content, channels).pixels == levels >> 8).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_16_bits_are_kept_in_compressed_tiff(compression: str) -> None:
    levels = levels16(6, 10)
    content = saved(Image.fromarray(levels), "TIFF", compression=compression)
    assert (decode_pixels(content, 1, bits=16).pixels[..., 0] == levels).all()


def test_16_bits_with_white_is_zero() -> None:
    levels = levels16(4, 5, 1)
    found = decode_pixels(tiff16(levels, "<", photometric=0), 1, bits=16).pixels
    assert (found == 65535 - levels).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_kept_in_ppm(channels: int) -> None:
    levels = levels16(6, 10, channels)
    magic = b"P5" if channels == 1 else b"P6"
    content = magic + b" 10 6 65535\n" + levels.astype(">u2").tobytes()
    assert (decode_pixels(content, channels, bits=16).pixels == levels).all()
    assert (decode_image(content, (channels, 6, 10)) == levels >> 8).all()
    low = (levels % 1024).astype(">u2")
    found = decode_pixels(magic + b" 10 6 1023\n" + low.tobytes(), channels, bits=16).pixels
    assert np.abs(found - low * (65535 / 1023)).max() <= 0.51


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_16_bits_with_alpha(channels: int, bits: int) -> None:
    levels = levels16(6, 10, channels)
    levels[:2, :, -1], levels[2:4, :, -1] = 0, 65535
    found = decode_pixels(png16(levels), channels - 1, bits=bits)
    opacity = levels[..., -1:] / 65535
    expected = levels[..., :-1] * opacity + 65535 * (1 - opacity)
    step = 1 if bits == 16 else 257
    assert np.abs(found.pixels - expected / step).max() <= (0.51 if bits == 16 else 2)
    assert "transparent" in found.remarks
    if channels == 4:
        tiff = tiff16(levels, "<")
        assert (decode_pixels(tiff, 3, bits=bits).pixels == found.pixels).all()


def test_16_bits_with_a_color_key_of_16_bits() -> None:
    levels = levels16(6, 10, 3)
    levels[1, 2] = 0x1234, 0x5678, 0x9ABC
    levels[1, 3] = 0x1235, 0x5678, 0x9ABC  # the same upper bytes
    content = png16(levels, ("tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    found = decode_pixels(content, 3, bits=16).pixels
    assert (found[1, 2] == 65535).all()
    assert (found[1, 3] == levels[1, 3]).all()
    assert (decode_pixels(content, 3).pixels[1, 3] == levels[1, 3] >> 8).all()


def test_16_bits_that_are_reduced_report_the_remaining_levels() -> None:
    levels = np.arange(1000, dtype=np.uint16).reshape(10, 100, 1)
    assert decode_pixels(png16(levels), 1).remarks == {"reduced": "1,000 levels became 4"}
    assert decode_pixels(png16(levels), 1, bits=16).remarks == {}


def test_16_bits_are_expanded_from_8() -> None:
    pixels = noise(6, 10, 3)
    found = decode_pixels(encode_png(pixels), 3, bits=16).pixels
    assert (found == pixels.astype(np.uint16) * 257).all()


def test_16_bits_are_resized_and_converted_to_gray_in_full_precision() -> None:
    levels = np.full((8, 8, 3), 30_001, np.uint16)
    for resize in ("lanczos", "box"):
        out = np.empty((4, 4, 1), np.uint16)
        decode_image_into(png16(levels), out, resize)
        assert (out == 30_001).all()


def test_16_bits_with_another_profile_are_rejected_by_name() -> None:
    profile = b"p\0\0" + zlib.compress(rgb_profile(1.0))
    content = png16(levels16(6, 10, 3), ("iCCP", profile))
    with pytest.raises(CodecError):
        decode_pixels(content, 3, bits=16)
    assert decode_pixels(content, 3).remarks.keys() == {"reduced", "profiles"}


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.linspace(0, 1, 60, dtype=np.float32).reshape(6, 10)),
        Image.fromarray(np.arange(60, dtype=np.int32).reshape(6, 10) * 10_000),
    ],
    ids=["floats", "32 bits"],
)
def test_levels_of_unknown_range_are_rejected_not_clipped(image: Image.Image) -> None:
    content = saved(image, "TIFF")
    for read in (read_image_shape, lambda c: decode_pixels(c, 1)):
        with pytest.raises(CodecError):
            read(content)


def test_signed_levels_are_rejected_not_wrapped() -> None:
    plain = tiff16(levels16(4, 5, 1), "<", photometric=1)
    signed = saved(Image.fromarray(noise(4, 5)), "TIFF", tiffinfo={339: 2})
    assert read_image_shape(plain) == (1, 4, 5)
    with pytest.raises(CodecError):
        read_image_shape(signed)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_bits_are_expanded_to_8(mode: str) -> None:
    image = smooth(16, 24).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert (decode_image(saved(image), (3, 16, 24)) == expected).all()
    four = smooth(16, 24).quantize(16)
    assert (decode_image(saved(four, bits=4), (3, 16, 24)) == np.asarray(four.convert("RGB"))).all()


# Formats


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_formats_are_detected_by_content(kind: str) -> None:
    content = saved(smooth(16, 24), kind)
    header = read_image_header(content)
    assert header.format == kind
    assert (header.height, header.width) == (16, 24)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert (decode_image(content, (3, 16, 24)) == expected).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_animated_images_is_decoded_and_marked(kind: str) -> None:
    first, second = smooth(16, 24), Image.new("RGB", (24, 16))
    content = saved(first, kind, save_all=True, append_images=[second], lossless=True)
    assert read_image_header(content).is_animated
    assert not read_image_header(saved(first, kind)).is_animated
    found = decode_image(content, (3, 16, 24)).astype(int)
    assert np.abs(found - np.asarray(first)).mean() < 12


def test_first_image_of_phones_multi_jpeg_files_is_decoded() -> None:
    content = saved(smooth(16, 24), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert read_image_header(content).format == "JPEG"
    plain = saved(smooth(16, 24), "JPEG")
    assert (decode_image(content, (3, 16, 24)) == decode_image(plain, (3, 16, 24))).all()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(40), "raw"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(40), "raw"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(40), "raw"),
        (b"%PDF-1.7" + bytes(40), "PDF"),
        (saved(smooth(16, 24), "TIFF", tiffinfo={254: 1}), "raw"),
        (saved(smooth(16, 24), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "raw"),
    ],
)
def test_unsupported_formats_are_named(content: bytes, kind: str) -> None:
    for read in (read_image_header, lambda c: decode_image(c, (3, 16, 24))):
        with pytest.raises(CodecError) as found:
            read(content)
        assert kind in str(found.value)


def jpeg_with(marker: int, bits: int = 8) -> bytes:
    parts, scan = segments(simplejpeg.encode_jpeg(np.asarray(smooth(16, 24))))
    changed = [
        bytes([0xFF, marker]) + p[2:4] + bytes([bits]) + p[5:] if p[1] == 0xC0 else p for p in parts
    ]
    return joined(changed, scan)


@pytest.mark.parametrize("content", [jpeg_with(0xC1, 12), jpeg_with(0xC3), jpeg_with(0xC5)])
def test_jpegs_of_unsupported_processes_raise_a_named_error(content: bytes) -> None:
    with pytest.raises(CodecError) as caught:
        decode_image(content, (3, 16, 24))
    assert "JPEG" in str(caught.value)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": "4:1:1"}, {}])
def test_jpegs_are_the_same_by_fast_path_turned_and_resized(options: dict[str, Any]) -> None:
    """All paths use one decoder: turned or resized images have the pixels of the fast path."""
    plain = saved(Image.fromarray(noise(24, 40, 3)), "JPEG", **options)
    fast = decode_image(plain, (3, 24, 40))
    assert (decode_pixels(plain, 3).pixels == fast).all()
    assert (decode_pixels(plain, 1).pixels == decode_image(plain, (1, 24, 40))).all()
    parts, scan = segments(plain)
    for value in range(2, 9):
        content = joined([parts[0], segment(0xE1, exif(value)), *parts[1:]], scan)
        expected = turned(fast, value)
        assert (decode_image(content, (3, *expected.shape[:2])) == expected).all()


def zero_sized() -> list[bytes]:
    parts, scan = segments(simplejpeg.encode_jpeg(np.asarray(smooth(16, 24))))
    flat = [p[:5] + bytes(2) + p[7:] if p[1] == 0xC0 else p for p in parts]
    empty = png([("IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), ("IDAT", b"")])
    return [joined(flat, scan), empty, b"P6 0 5 255\n", b""]


@pytest.mark.parametrize("number", range(4))
def test_images_without_pixels_raise_a_codec_error(number: int) -> None:
    with pytest.raises(CodecError):
        read_image_header(zero_sized()[number])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_truncated_images_are_rejected(kind: str) -> None:
    content = saved(Image.fromarray(noise(32, 48, 3)), kind)
    for part in (0.2, 0.6, 0.9):
        with pytest.raises(CodecError):
            decode_pixels(content[: int(len(content) * part)], 3)


def test_hostile_jpegs_are_decoded_in_bounded_time() -> None:
    many = joined([segment(0xE5, b"")] * 100_000, b"\xff\xda")
    with pytest.raises(CodecError):
        read_image_header(many)
    progressive = saved(smooth(16, 24), "JPEG", progressive=True)
    scans = progressive[:-2] + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0?\0" * 500 + b"\xff\xd9"
    with pytest.raises(CodecError):
        read_image_header(scans)
    with pytest.raises(CodecError):
        read_image_header(b"\xff\xd8" + b"\xff" * 2_000_000)
