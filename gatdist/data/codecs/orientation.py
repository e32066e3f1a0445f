"""EXIF orientation: the one function that decides how an image is turned.

The rule, for every format and every command:

* Orientation is tag 0x0112 of the first image directory (IFD0) of the file's EXIF data: a single
  whole number from 1 to 8. Anything else (0, 9, negative, several numbers, text, a directory that
  is cut short before the tag) means 1, upright. The thumbnail's directory (IFD1) is not looked at.
* EXIF data is the first ``Exif`` segment of a JPEG (wherever it stands before the scan), the
  ``eXIf`` chunk of a PNG, the ``EXIF`` chunk of a WebP; a TIFF is an EXIF directory itself.
* ``tiff:Orientation`` in XMP is ignored, as browsers do.
"""

from __future__ import annotations

import struct
from typing import Any

from numpy.typing import NDArray

EXIF_PREFIX = b"Exif\0\0"

ORIENTATION = 0x0112  # the tag
_UPRIGHT = 1
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# EXIF's types of whole numbers: SHORT, LONG, SSHORT, SLONG.
_WHOLE_NUMBERS = {3: "H", 4: "I", 8: "h", 9: "i"}
_ENTRY_BYTES = 12


def exif_orientation(exif: bytes) -> int:
    """Orientation, 1 to 8, of EXIF data with or without its ``Exif`` prefix; 1 without any."""
    data = exif.removeprefix(EXIF_PREFIX)
    order = _BYTE_ORDERS.get(data[:4])
    if order is None:
        return _UPRIGHT
    try:
        (begin,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, begin)
    except struct.error:
        return _UPRIGHT
    first = begin + 2
    end = min(first + count * _ENTRY_BYTES, len(data) - _ENTRY_BYTES + 1)
    found = _UPRIGHT
    for entry in range(first, end, _ENTRY_BYTES):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
        if tag == ORIENTATION:  # of several, the last: so does Pillow, which reads TIFF for us
            single = number == 1 and kind in _WHOLE_NUMBERS
            at = entry + 8
            (value,) = (
                struct.unpack_from(f"{order}{_WHOLE_NUMBERS[kind]}", data, at) if single else (0,)
            )
            found = valid_orientation(value)
    return found


def valid_orientation(value: object) -> int:
    """``value`` if it is a whole number from 1 to 8, else 1."""
    return value if type(value) is int and 1 <= value <= 8 else _UPRIGHT


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Height and width of a stored image of ``height`` × ``width`` when it is upright."""
    return (width, height) if orientation >= 5 else (height, width)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn stored pixels [H, W, C] upright. A view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::down, ::across]
