"""Image file formats: recognition by content, JPEG segments and EXIF orientation.

Orientation is EXIF tag 0x0112 of the first directory (IFD0), an integer from 1 to 8; anything else
means 1, upright. XMP's is ignored, as in browsers. EXIF data is the first ``Exif`` segment of a
JPEG, the ``eXIf`` chunk of a PNG, or the ``EXIF`` chunk of a WebP; a TIFF is a directory itself.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image, ImageFile, features
from PIL.JpegImagePlugin import JpegImageFile

from gatdist.data.codecs import CodecError

# File extensions of the supported formats. The content of a file decides its format.
IMAGE_COMPONENTS = (
    *("png", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "bmp", "tif", "tiff", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "avif"),
)
# File extensions of unsupported image formats, with the format's name.
UNSUPPORTED_IMAGES: Mapping[str, str] = {
    **dict.fromkeys(("heic", "heif", "hif"), "HEIC"),
    **dict.fromkeys(("psd", "psb"), "Photoshop"),
    "jxl": "JPEG XL",
    **dict.fromkeys(("jp2", "j2k", "jpx", "jpf", "j2c", "jpc"), "JPEG 2000"),
    "svg": "SVG",
    **dict.fromkeys(("eps", "ai"), "PostScript"),
    "pdf": "PDF",
    "xcf": "GIMP",
    **dict.fromkeys(("exr", "hdr"), "high dynamic range"),
    "ico": "icon",
    "tga": "Targa",
    **dict.fromkeys(("dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "srf", "sr2"), "raw camera"),
    **dict.fromkeys(("raf", "rw2", "orf", "pef", "srw", "raw", "x3f", "3fr"), "raw camera"),
    **dict.fromkeys(("iiq", "erf", "mrw", "rwl", "dcr", "kdc"), "raw camera"),
}

JPEG_MAGIC = b"\xff\xd8\xff"
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, JPEG_MAGIC, "JPEG"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    *((0, b"P%d" % number, "PPM") for number in range(1, 7)),
)
_FOREIGN_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "Photoshop"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (8, b"CR\x02", "raw camera"),
    (4, b"ftypcrx ", "raw camera"),
    (0, b"FUJIFILMCCD-RAW", "raw camera"),
    *((0, magic, "raw camera") for magic in (b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FOVb")),
    *((4, b"ftyp" + brand, "HEIC") for brand in _HEIC_BRANDS),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"\x76\x2f\x31\x01", "high dynamic range"),
)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_CHUNKS = 2**16
_DNG_VERSION, _KIND_OF_PAGE, _REDUCED_PAGE = 50706, 254, 1

EXIF_PREFIX = b"Exif\0\0"
ORIENTATION = 0x0112  # EXIF tag
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_INTEGER_TYPES = {3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's SHORT, LONG, SSHORT, SLONG
_ENTRY_BYTES = 12

# Decoders skip fill bytes and anything else between JPEG segments.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_APP1, _APP2, _END, _SCAN = 0xE1, 0xE2, 0xD9, 0xDA
# Frame headers (SOFn). C4, C8 and CC are not frames.
_FRAMES = {
    **{0xC0: "baseline", 0xC1: "sequential", 0xC2: "progressive"},
    **dict.fromkeys((0xC3, 0xCB), "lossless"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
    **dict.fromkeys((0xC9, 0xCA), "arithmetic-coded"),
}
_PROFILE_PREFIX = b"ICC_PROFILE\0"
# Camera files have fewer than a hundred segments, or some hundreds with a large ICC profile.
_MAX_SEGMENTS = 4096
# Each scan of a progressive JPEG visits every pixel again. Encoders write about ten.
_MAX_SCANS = 200


def unsupported_image(kind: str) -> str:
    """Return the problem of an unsupported image format, to follow the file's name."""
    return f"has the format {kind}, which is not supported: convert it to PNG or JPEG"


def image_format(content: bytes) -> str:
    """Return Pillow's name of the format. Raises CodecError if unknown or unsupported."""
    for at, magic, kind in _MAGIC:
        if content.startswith(magic, at) and (kind != "WEBP" or content.startswith(b"RIFF")):
            return kind
    brands = content[8 : min(int.from_bytes(content[:4]), 256)] if content[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        if not features.check("avif"):
            raise CodecError("is an AVIF image, which needs Pillow 11.3 or newer")
        return "AVIF"
    for at, magic, kind in _FOREIGN_MAGIC:
        if content.startswith(magic, at):
            raise CodecError(unsupported_image(kind), hint="Convert it to PNG or JPEG")
    if content.startswith(_TIFF_MAGIC):
        return "TIFF"
    raise CodecError("is not a readable image (unknown format)")


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Open an image by its content and read its header, which may raise any error if damaged."""
    kind = image_format(content)
    file = io.BytesIO(content)
    if kind == "JPEG":
        return JpegImageFile(file)  # Image.open would look for the extra images that phones add
    Image.preinit()
    if kind not in Image.OPEN:
        Image.init()
    image = Image.OPEN[kind][0](file, "")
    if kind == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        # A raw camera file begins with a small preview.
        if _DNG_VERSION in tags or tags.get(_KIND_OF_PAGE) == _REDUCED_PAGE:
            raise CodecError(unsupported_image("raw camera"), hint="Convert it to PNG or JPEG")
    return image


def png_exif(content: bytes) -> bytes:
    """Return the ``eXIf`` chunk of a PNG, which may follow its pixels; empty if absent."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        size, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        if kind == b"eXIf":
            return content[at + 8 : at + 8 + size]
        if len(kind) < 4 or kind == b"IEND":
            break
        at += size + 12
    return b""


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in EXIF data with or without its ``Exif`` prefix."""
    data = exif.removeprefix(EXIF_PREFIX)
    order = _BYTE_ORDERS.get(data[:4])
    if order is None:
        return 1
    try:
        (begin,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, begin)
    except struct.error:
        return 1
    first = begin + 2
    end = min(first + count * _ENTRY_BYTES, len(data) - _ENTRY_BYTES + 1)
    found = 1
    for entry in range(first, end, _ENTRY_BYTES):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
        if tag == ORIENTATION:  # the last one wins, as in Pillow, which reads TIFF
            value = 0
            if number == 1 and kind in _INTEGER_TYPES:
                (value,) = struct.unpack_from(f"{order}{_INTEGER_TYPES[kind]}", data, entry + 8)
            found = valid_orientation(value)
    return found


def valid_orientation(value: object) -> int:
    """Return ``value`` if it is an integer from 1 to 8, else 1."""
    return value if type(value) is int and 1 <= value <= 8 else 1


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Return the upright (height, width) of an image stored as ``height`` × ``width``."""
    return (width, height) if orientation >= 5 else (height, width)


def same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes, (height, width), have one aspect ratio.

    The smaller one may be rounded to whole pixels.
    """
    (h, w), (height, width) = one, other
    return abs(h * width - w * height) <= max(h, w, height, width)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return an upright view of stored pixels [H, W, C]."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::down, ::across]


class JpegHeader(NamedTuple):
    """Contents of a JPEG's segments before its first scan."""

    height: int  # in pixels, as stored
    width: int  # in pixels, as stored
    channels: int  # 1 (gray), 3 (color) or 4 (CMYK)
    bits: int  # per channel, usually 8
    process: str  # such as ``baseline`` or ``progressive``
    orientation: int  # 1 to 8
    profile: bytes  # ICC profile; empty if absent, damaged if a part is missing


def read_jpeg_header(content: bytes) -> JpegHeader:
    """Read the segments before the first scan. Raises CodecError if there is no frame."""
    exif = b""
    parts: dict[bytes, bytes] = {}
    frame: tuple[str, bytes] | None = None
    at, size = 2, len(content)
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > size:
            break
        marker = content[at + 1]
        if content[at] != 0xFF or marker in (0x00, 0xFF):
            found = _MARKER.search(content, at)
            if found is None:
                break
            at = found.start()
            continue
        at += 2
        if marker in (_END, _SCAN):
            break
        if marker in _WITHOUT_LENGTH:
            continue
        end = at + max(2, int.from_bytes(content[at : at + 2]))
        if marker in _FRAMES and frame is None:
            frame = _FRAMES[marker], content[at + 2 : end]
        elif marker == _APP1 and not exif and content.startswith(EXIF_PREFIX, at + 2, end):
            exif = content[at + 2 : end]
        elif marker == _APP2 and content.startswith(_PROFILE_PREFIX, at + 2, end):
            parts.setdefault(content[at + 14 : at + 15], content[at + 16 : end])
        at = end
    else:
        rule = f"is a JPEG with more than {_MAX_SEGMENTS:,} segments before its image"
        raise CodecError(rule, hint="Remove it, or save it again")
    if frame is None or len(frame[1]) < 6:
        raise CodecError("is not a readable image (a JPEG without a frame)")
    process, head = frame
    if process == "progressive" and content.count(b"\xff\xda") > _MAX_SCANS:
        rule = f"is a progressive JPEG with more than {_MAX_SCANS} scans"
        raise CodecError(rule, hint="Remove it, or save it again")
    return JpegHeader(
        height=int.from_bytes(head[1:3]),
        width=int.from_bytes(head[3:5]),
        channels=head[5],
        bits=head[0],
        process=process,
        orientation=exif_orientation(exif) if exif else 1,
        profile=b"".join(parts[number] for number in sorted(parts)),
    )
