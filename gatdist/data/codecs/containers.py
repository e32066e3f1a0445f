"""What files of sounds really hold, whatever their headers say: FLAC, WAV and Ogg, walked through.

libsndfile trusts headers: it reads half of a FLAC whose header says so, none of one whose header
says nothing (as an encoder that wrote into a pipe leaves it), and the first of two files that were
put together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from gatdist.data.codecs.errors import CodecError

_PIPE_SIZES = (0, 0xFFFFFFFF)  # of a WAV that was written into a pipe
_ID3 = b"TAG"  # 128 bytes that taggers put behind a file
_ID3_BYTES = 128
# Of FLAC's STREAMINFO: 4 bits of something else, and 36 of the number of samples.
_TOTAL = slice(21, 26)
_FLAC_BEGINS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_LARGEST_FRAME_BYTES = 2**21
_HINT = "Write the file again, or take it out"


def honest(content: bytes, *, whole: bool = True) -> bytes:
    """The file with a header that says what it holds; the same one where it does already.

    Args:
        content: the file.
        whole: look for data after the end of FLAC, too, which takes long.

    Raises:
        CodecError: it is cut short, or has data after its end.
    """
    if content[:4] == b"fLaC":
        return _flac(content, whole=whole)
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return _wav(content)
    if content[:4] == b"OggS":
        _require_one_ogg(content)
    return content


def _trailing(at: int) -> CodecError:
    return CodecError(f"has data after the end at byte {at}", hint=_HINT)


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
            rule = f"is cut short: {name.decode()!r} ends at byte {at + 8 + length} of {size}"
            raise CodecError(rule, hint=_HINT)
        has_data = has_data or name == b"data"
        at += 8 + length + length % 2
    if any(content[at:]):
        raise _trailing(at)
    return content


def _require_one_ogg(content: bytes) -> None:
    at, size, ended = 0, len(content), set[int]()
    begun: set[int] = set()
    while at < size:
        if content[at : at + 4] != b"OggS":
            if any(content[at:]) and not _is_id3(content, at):
                raise _trailing(at)
            break
        if at + 27 > size:
            raise CodecError(f"is cut short at byte {at} of {size}", hint=_HINT)
        flags, serial, count = content[at + 5], content[at + 14 : at + 18], content[at + 26]
        number = int.from_bytes(serial, "little")
        if flags & 2 and ended and ended == begun:
            raise _trailing(at)
        begun.add(number)
        stop = at + 27 + count + sum(content[at + 27 : at + 27 + count])
        if stop > size:
            raise CodecError(f"is cut short: a page ends at byte {stop} of {size}", hint=_HINT)
        if flags & 4:
            ended.add(number)
        at = stop
    if ended != begun:
        raise CodecError("is cut short: it has no last page", hint=_HINT)


def _is_id3(content: bytes, at: int) -> bool:
    return content[at : at + 3] == _ID3 and len(content) - at == _ID3_BYTES


def _flac(content: bytes, *, whole: bool) -> bytes:
    """With the number of samples that the last frame tells."""
    end = len(content)
    if _is_id3(content, end - _ID3_BYTES):
        end -= _ID3_BYTES
    at, is_last = 4, False
    while not is_last:
        if at + 4 > end:
            raise CodecError("is cut short in its header", hint=_HINT)
        is_last = bool(content[at] & 0x80)
        at += 4 + int.from_bytes(content[at + 1 : at + 4], "big")
    for marker in _FLAC_BEGINS:
        if (other := content.find(marker, at)) >= 0:
            raise _trailing(other)
    message = int.from_bytes(content[_TOTAL], "big") & (2**36 - 1)
    for begin, total in _flac_frames(content, at, end):
        if total == message and not whole:
            return content
        if _crc16(content[begin:end]) == 0:
            break
    else:
        rule = "does not end with a whole frame: it is cut short, or has data after the end"
        raise CodecError(rule, hint=_HINT)
    if total == message:
        return content
    number = (int.from_bytes(content[_TOTAL], "big") >> 36 << 36) | total
    return content[: _TOTAL.start] + number.to_bytes(5, "big") + content[_TOTAL.stop :]


def _flac_frames(content: bytes, first: int, end: int) -> Iterator[tuple[int, int]]:
    """What may be the last frame, from the end: where it begins, and the samples up to its end."""
    stop, block = end, int.from_bytes(content[8:10], "big")
    while (begin := content.rfind(b"\xff", first, stop)) >= 0:
        stop = begin
        header = content[begin : min(begin + 16, end)]
        if len(header) < 6 or header[1] & 0xFE != 0xF8 or begin < end - _LARGEST_FRAME_BYTES:
            if begin < end - _LARGEST_FRAME_BYTES:
                return
            continue
        if (read := _flac_header(header)) is not None:
            number, count = read
            yield begin, (number if header[1] & 1 else number * block) + count


def _flac_header(header: bytes) -> tuple[int, int] | None:
    """Number of the frame, or of its first sample, and how many samples it has."""
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


def _table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << (bits - 8)
        for _ in range(8):
            crc = crc << 1 ^ (polynomial if crc >> (bits - 1) & 1 else 0)
        table.append(crc & (1 << bits) - 1)
    return table


_CRC8, _CRC16 = _table(0x107, 8), _table(0x18005, 16)


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
