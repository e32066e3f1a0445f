"""Image formats: which are read, how they are recognized, and those that are refused by name."""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image, ImageFile, features
from PIL.JpegImagePlugin import JpegImageFile

from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.jpeg import JPEG_MAGIC

# Extensions of the formats that are read. What a file is, its content decides.
IMAGE_COMPONENTS = (
    *("png", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "bmp", "tif", "tiff", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "avif"),
)
# Extensions of images that are not read, and what they are.
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
_MOST_CHUNKS = 2**16
_DNG_VERSION, _KIND_OF_PAGE, _REDUCED_PAGE = 50706, 254, 1


def unsupported_image(kind: str) -> str:
    """The problem of an image of such a kind, to be put after its name."""
    return f"has the format {kind}, which is not supported: convert it to PNG or JPEG"


def image_format(content: bytes) -> str:
    """Pillow's name of the format that the content has.

    Raises:
        CodecError: it is none that is read.
    """
    for at, magic, kind in _MAGIC:
        if content.startswith(magic, at) and (kind != "WEBP" or content.startswith(b"RIFF")):
            return kind
    brands = content[8 : min(int.from_bytes(content[:4]), 256)] if content[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        if not features.check("avif"):
            raise CodecError("is an AVIF image, which this Pillow does not read: install 11.3")
        return "AVIF"
    for at, magic, kind in _FOREIGN_MAGIC:
        if content.startswith(magic, at):
            raise CodecError(unsupported_image(kind), hint="Convert it to PNG or JPEG")
    if content.startswith(_TIFF_MAGIC):
        return "TIFF"
    raise CodecError("is no readable picture (of no known format)")


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Open a file by what it is, whatever it is called. Its header is read, its pixels are not.

    Nothing bounds its size yet: Pillow's own limit warns on standard error, ours is an error.

    Raises:
        CodecError: it is no image, or one that is not supported.
        Exception: nearly any, where it is damaged.
    """
    kind = image_format(content)
    file = io.BytesIO(content)
    if kind == "JPEG":
        return JpegImageFile(file)  # Pillow's function would look for more images, as phones add
    Image.preinit()
    if kind not in Image.OPEN:
        Image.init()
    image = Image.OPEN[kind][0](file, "")
    if kind == "TIFF":
        _require_photo(image)
    return image


def _require_photo(image: ImageFile.ImageFile) -> None:
    """Refuse a raw file of a camera, which begins with a small preview."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if _DNG_VERSION in tags or tags.get(_KIND_OF_PAGE) == _REDUCED_PAGE:
        raise CodecError(unsupported_image("raw camera"), hint="Convert it to PNG or JPEG")


def png_exif(content: bytes) -> bytes:
    """The ``eXIf`` chunk of a PNG, which may stand behind its pixels; empty without one."""
    at = 8
    for _ in range(_MOST_CHUNKS):
        size, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        if kind == b"eXIf":
            return content[at + 8 : at + 8 + size]
        if len(kind) < 4 or kind == b"IEND":
            break
        at += size + 12
    return b""
