"""The header of a JPEG: what its segments say before the first scan."""

from __future__ import annotations

import re
from typing import NamedTuple

from gatdist.data.codecs.errors import CodecError
from gatdist.data.codecs.orientation import EXIF_PREFIX, exif_orientation

JPEG_MAGIC = b"\xff\xd8\xff"

# A marker may follow any number of fill bytes; decoders skip what stands between segments.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_APP1, _APP2, _END, _SCAN = 0xE1, 0xE2, 0xD9, 0xDA
# The frame headers (SOFn), and what they mean. C4, C8 and CC are no frames.
_FRAMES = {
    0xC0: "baseline",
    0xC1: "sequential",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
    0xCB: "lossless",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "hierarchical",
}
_PROFILE_PREFIX = b"ICC_PROFILE\0"
# Files of cameras have fewer than a hundred segments, or some hundred with a large profile.
_MOST_SEGMENTS = 4096
# Each scan of a progressive JPEG visits every pixel again. Encoders write about ten.
_MOST_SCANS = 200


class JpegHeader(NamedTuple):
    """What a JPEG says before its first scan.

    Attributes:
        height: in pixels, as stored, and
        width: likewise.
        channels: 1 (gray), 3 (colour) or 4 (CMYK).
        bits: of each channel, 8 usually.
        process: such as ``baseline`` or ``progressive``.
        orientation: 1 to 8.
        profile: the ICC profile; empty without one, damaged where a part is missing.
    """

    height: int
    width: int
    channels: int
    bits: int
    process: str
    orientation: int
    profile: bytes


def read_jpeg_header(content: bytes) -> JpegHeader:
    """Read the segments up to the first scan. Raises CodecError if there is no frame."""
    exif = b""
    parts: dict[bytes, bytes] = {}
    frame: tuple[str, bytes] | None = None
    at, size = 2, len(content)
    for _ in range(_MOST_SEGMENTS):
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
        if marker in _ALONE:
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
        raise CodecError(
            f"is a JPEG with more than {_MOST_SEGMENTS:,} segments before its image",
            hint="Take it out, or save it anew",
        )
    if frame is None or len(frame[1]) < 6:
        raise CodecError("is no readable picture (a JPEG without a frame)")
    process, head = frame
    if process == "progressive" and content.count(b"\xff\xda") > _MOST_SCANS:
        raise CodecError(
            f"is a progressive JPEG with more than {_MOST_SCANS} scans",
            hint="Take it out, or save it anew",
        )
    return JpegHeader(
        height=int.from_bytes(head[1:3]),
        width=int.from_bytes(head[3:5]),
        channels=head[5],
        bits=head[0],
        process=process,
        orientation=exif_orientation(exif) if exif else 1,
        profile=b"".join(parts[number] for number in sorted(parts)),
    )
