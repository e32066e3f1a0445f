"""Which of Unicode's encodings a text file is in."""

from __future__ import annotations

# Of the longest first, since UTF-32's mark begins with UTF-16's.
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Which of the first four bytes are 0 where the file begins with ASCII characters and has no mark.
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}


def unicode_encoding(begin: bytes) -> str:
    """The codec for a text file that begins with these four bytes, as RFC 4627 detects it.

    UTF-8 where nothing speaks for another; its byte order mark is skipped.
    """
    for mark, codec in _MARKS.items():
        if begin.startswith(mark):
            return codec
    return _ZEROS.get(tuple(byte == 0 for byte in begin[:4]), "utf-8-sig")
