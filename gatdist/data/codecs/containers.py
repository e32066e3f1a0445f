"""Consistency checks and header repair of audio containers: FLAC, WAV and Ogg.

libsndfile trusts headers: it reads half of a FLAC whose header says so, nothing of one without a
length (as written to a pipe), and only the first of two concatenated files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gatdist.data.codecs import CodecError

_PIPE_SIZES = (0, 0xFFFFFFFF)  # of a WAV that was written to a pipe
_ID3, _ID3_BYTES = b"TAG", 128  # appended by taggers
# In FLAC's STREAMINFO: 4 bits of something else, then 36 bits of the number of samples.
_TOTAL = slice(21, 26)
_FLAC_BEGINS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_LARGEST_FRAME_BYTES = 2**21
_HINT = "Write the file again, or remove it"


def repaired(content: bytes, *, whole: bool = True) -> bytes:
    """Return the file with a header that matches its content. Raises CodecError if truncated.

    With ``whole``, also look for data after the end of FLAC, which is slow.
    """
    if content[:4] == b"fLaC":
        return _flac(content, whole=whole)
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return _wav(content)
    if content[:4] == b"OggS":
        _require_one_ogg(content)
    return content


def _trailing(at: int) -> CodecError:
    return CodecError(f"has data after its end at byte {at}", hint=_HINT)


def _wav(content: bytes) -> bytes:
    at, size, has_data = 12, len(content), False
    while at + 8 <= size:
        name, length = struct.unpack_from("<4sI", content, at)
        if name == b"data" and length in _PIPE_SIZES:
            length = size - at - 8
            head = content[: at + 4] + struct.pack("<I", length)
            content = head + content[at + 8 :]
        elif not name.isascii() or not name.decode().isprintable() or name in (b"RIFF", b"RIFX"):
            raise _trailing(at)
        if at + 8 + length > size:
            if has_data:
                raise _trailing(at)
            rule = f"is truncated: {name.decode()!r} ends at byte {at + 8 + length} of {size}"
            raise CodecError(rule, hint=_HINT)
        has_data = has_data or name == b"data"
        at += 8 + length + length % 2
    if any(content[at:]):
        raise _trailing(at)
    return content


def _require_one_ogg(content: bytes) -> None:
    at, size = 0, len(content)
    begun, ended = set[int](), set[int]()
    while at < size:
        if content[at : at + 4] != b"OggS":
            if any(content[at:]) and not _is_id3(content, at):
                raise _trailing(at)
            break
        if at + 27 > size:
            raise CodecError(f"is truncated at byte {at} of {size}", hint=_HINT)
        flags, serial, count = content[at + 5], content[at + 14 : at + 18], content[at + 26]
        number = int.from_bytes(serial, "little")
        if flags & 2 and ended and ended == begun:
            raise _trailing(at)
        begun.add(number)
        stop = at + 27 + count + sum(content[at + 27 : at + 27 + count])
        if stop > size:
            raise CodecError(f"is truncated: a page ends at byte {stop} of {size}", hint=_HINT)
        if flags & 4:
            ended.add(number)
        at = stop
    if ended != begun:
        raise CodecError("is truncated: it has no last page", hint=_HINT)


def _is_id3(content: bytes, at: int) -> bool:
    return content[at : at + 3] == _ID3 and len(content) - at == _ID3_BYTES


def _flac(content: bytes, *, whole: bool) -> bytes:
    """Set the number of samples from the last frame."""
    end = len(content)
    if _is_id3(content, end - _ID3_BYTES):
        end -= _ID3_BYTES
    at, is_last = 4, False
    while not is_last:
        if at + 4 > end:
            raise CodecError("is truncated in its header", hint=_HINT)
        is_last = bool(content[at] & 0x80)
        at += 4 + int.from_bytes(content[at + 1 : at + 4], "big")
    for marker in _FLAC_BEGINS:
        if (other := content.find(marker, at)) >= 0:
            raise _trailing(other)
    stated = int.from_bytes(content[_TOTAL], "big") & (2**36 - 1)
    for begin, total in _flac_frames(content, at, end):
        if total == stated and not whole:
            return content
        if _crc16(content[begin:end]) == 0:
            break
    else:
        rule = "does not end with a whole frame: it is truncated, or has data after its end"
        raise CodecError(rule, hint=_HINT)
    if total == stated:
        return content
    number = (int.from_bytes(content[_TOTAL], "big") >> 36 << 36) | total
    return content[: _TOTAL.start] + number.to_bytes(5, "big") + content[_TOTAL.stop :]


def _flac_frames(content: bytes, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield candidates of the last frame, from the end: its first byte, and samples to its end."""
    stop, block = end, int.from_bytes(content[8:10], "big")
    while (begin := content.rfind(b"\xff", first, stop)) >= 0:
        stop = begin
        header = content[begin : min(begin + 16, end)]
        if begin < end - _LARGEST_FRAME_BYTES:
            return
        if len(header) < 6 or header[1] & 0xFE != 0xF8:
            continue
        if (read := _flac_header(header)) is not None:
            number, count = read
            yield begin, (number if header[1] & 1 else number * block) + count


def _flac_header(header: bytes) -> tuple[int, int] | None:
    code, rate, length = header[2] >> 4, header[2] & 15, 1
    first = header[4]
    if first >= 0xC0:
        length = next((n for n in range(2, 8) if first >> (7 - n) & 1 == 0), 0)
    elif first >= 0x80:
        return None
    at = 4 + length
    if not length or not code or at + 2 > len(header):
        return None
    number = first if length == 1 else first & (0x7F >> length)
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    if code in (6, 7):
        wide = code - 5
        count = int.from_bytes(header[at : at + wide], "big") + 1
        at += wide
    else:
        count = 192 if code == 1 else 144 << code if code < 6 else 1 << code
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    return number, count


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << (bits - 8)
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> (bits - 1) & 1 else 0)
        table.append(crc & (1 << bits) - 1)
    return table


_CRC8, _CRC16 = _crc_table(0x107, 8), _crc_table(0x18005, 16)


def _crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc16(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc = _CRC16[crc >> 8 ^ byte] ^ (crc & 0xFF) << 8
    return crc
