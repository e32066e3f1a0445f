"""Images whose segments, chunks or directory entries are shuffled and damaged, for :mod:`.fuzz`."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.images import decode_image_into, decode_pixels, read_image_header

_SIZE = 24, 36
_ENTRY_BYTES = 12
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def damaged(place: Path, chance: random.Random) -> tuple[str, Callable[[], str]]:
    name, content = chance.choice(SEEDS)
    split, join = _PARTS[name.partition(" ")[0]]
    head, parts, tail = split(content)
    done = []
    for _ in range(chance.choice([1, 1, 2, 4])):
        way = chance.choice(_WAYS)
        parts = way(parts, chance)
        done.append(way.__name__.strip("_"))
    found = join(head, parts, tail)
    if chance.random() < 0.1:
        found = found[: chance.randrange(len(found) + 1)]
        done.append("cut")
    return f"{name}: {', '.join(done)}", partial(decode, found)


def decode(content: bytes) -> str:
    """Read header and pixels in every way; they must agree, or raise CodecError."""
    try:
        header = read_image_header(content)
    except CodecError:
        return "named refusal of the header"
    shape = header.height, header.width
    try:
        pixels = decode_pixels(content, 3).pixels
    except CodecError:
        return "named refusal of the pixels"
    assert pixels.shape == (*shape, 3), (pixels.shape, shape)
    assert pixels.dtype == np.uint8
    out = np.empty_like(pixels)
    decode_image_into(content, out)
    assert (out == pixels).all(), "the fast path and packing differ"
    decode_image_into(content, np.empty((8, 8, 1), np.uint8), "box")
    try:
        deep = decode_pixels(content, 3, bits=16, background=(0, 0, 0)).pixels
    except CodecError:
        return "right, with named refusal of 16 bits"
    assert deep.shape == pixels.shape
    assert deep.dtype == np.uint16
    return "right"


def _seeds() -> list[tuple[str, bytes]]:
    draws = np.random.default_rng(0)
    rgba = draws.integers(0, 256, (*_SIZE, 4), dtype=np.uint8)
    color, clear = Image.fromarray(rgba[..., :3].copy()), Image.fromarray(rgba)
    deep = Image.fromarray(draws.integers(0, 65536, _SIZE, dtype=np.uint16))
    tags = Image.Exif()
    tags[0x0112] = 6
    more: dict[str, Any] = {
        "exif": tags,
        "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return [
        ("JPEG", saved(color, "JPEG", **more)),
        ("JPEG progressive", saved(color, "JPEG", progressive=True, **more)),
        ("JPEG gray", saved(color.convert("L"), "JPEG", **more)),
        ("JPEG cmyk", saved(color.convert("CMYK"), "JPEG", exif=tags)),
        ("PNG", saved(color, "PNG", **more)),
        ("PNG alpha", saved(clear, "PNG", **more)),
        ("PNG palette", saved(color.quantize(16), "PNG", transparency=3, **more)),
        ("PNG deep", saved(deep, "PNG", transparency=7, exif=tags)),
        ("WEBP", saved(clear, "WEBP", **more)),
        ("WEBP lossless", saved(color, "WEBP", lossless=True, **more)),
        ("TIFF", saved(clear, "TIFF", **more)),
        ("TIFF lzw", saved(color, "TIFF", compression="tiff_lzw", **more)),
        ("TIFF deep", saved(deep, "TIFF", compression="tiff_adobe_deflate", exif=tags)),
    ]


Parts = tuple[bytes, list[bytes], bytes]


def _jpeg_parts(content: bytes) -> Parts:
    parts, at = [], 2
    while content[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        parts.append(content[at:end])
        at = end
    return content[:2], parts, content[at:]


def _png_parts(content: bytes) -> Parts:
    parts, at = [], len(_PNG_MAGIC)
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        parts.append(content[at + 4 : at + 8 + size])
        at += 12 + size
    return _PNG_MAGIC, parts, b""


def _png(head: bytes, parts: list[bytes], tail: bytes) -> bytes:
    chunks = (
        struct.pack(">I", max(0, len(part) - 4)) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return head + b"".join(chunks) + tail


def _riff_parts(content: bytes) -> Parts:
    parts, at = [], 12
    while at < len(content):
        end = at + 8 + int.from_bytes(content[at + 4 : at + 8], "little")
        end += end % 2
        parts.append(content[at:end])
        at = end
    return content[:12], parts, b""


def _riff(head: bytes, parts: list[bytes], tail: bytes) -> bytes:
    body = b"".join(parts) + tail
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + head[8:12] + body


def _tiff_parts(content: bytes) -> Parts:
    at = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[at : at + 2], "little")
    entries = [content[at + 2 + i * _ENTRY_BYTES :][:_ENTRY_BYTES] for i in range(count)]
    return content, entries, b""


def _tiff(head: bytes, parts: list[bytes], tail: bytes) -> bytes:
    entries = b"".join(part[:_ENTRY_BYTES].ljust(_ENTRY_BYTES, b"\0") for part in parts)
    directory = struct.pack("<H", len(parts)) + entries + bytes(4)
    return head[:4] + struct.pack("<I", len(head)) + head[8:] + directory + tail


def _shuffle(parts: list[bytes], chance: random.Random) -> list[bytes]:
    return chance.sample(parts, len(parts))


def _swap(parts: list[bytes], chance: random.Random) -> list[bytes]:
    if len(parts) > 1:
        i, j = chance.sample(range(len(parts)), 2)
        parts[i], parts[j] = parts[j], parts[i]
    return parts


def _repeat(parts: list[bytes], chance: random.Random) -> list[bytes]:
    if parts:
        parts.insert(chance.randrange(len(parts) + 1), chance.choice(parts))
    return parts


def _remove(parts: list[bytes], chance: random.Random) -> list[bytes]:
    if parts:
        del parts[chance.randrange(len(parts))]
    return parts


def _flip(parts: list[bytes], chance: random.Random) -> list[bytes]:
    """Replace bytes of a part, mostly the first, which hold its kind and length."""
    if parts:
        i = chance.randrange(len(parts))
        part = bytearray(parts[i])
        for _ in range(chance.choice([1, 1, 3]) if part else 0):
            at = chance.randrange(min(len(part), chance.choice([4, 16, 64, 10**6])))
            part[at] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        parts[i] = bytes(part)
    return parts


def _noise(parts: list[bytes], chance: random.Random) -> list[bytes]:
    noise = chance.randbytes(chance.choice([0, 4, 12, 300]))
    parts.insert(chance.randrange(len(parts) + 1), noise)
    return parts


_WAYS = [_shuffle, _swap, _swap, _repeat, _remove, _flip, _flip, _flip, _noise]
_Join = Callable[[bytes, list[bytes], bytes], bytes]
_PARTS: dict[str, tuple[Callable[[bytes], Parts], _Join]] = {
    "JPEG": (_jpeg_parts, lambda head, parts, tail: head + b"".join(parts) + tail),
    "PNG": (_png_parts, _png),
    "WEBP": (_riff_parts, _riff),
    "TIFF": (_tiff_parts, _tiff),
}
SEEDS = _seeds()
