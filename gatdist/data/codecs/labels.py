"""Class labels: a class number, a class name, or missing.

* Surrounding white space and a byte order mark are ignored. ``3``, ``3.0``, ``+3``, ``3e0``,
  ``"3"`` and, with a decimal comma, ``3,0`` are the number 3.
* −1, null, NaN and empty text mean unlabelled.
* ``true``, ``false`` and any other printable text are names, in Unicode form NFC.
* Other numbers (0.5, −2, 1,000,000 and above) and other values (lists, objects) are invalid.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

from gatdist.common.strict_json import parse_json
from gatdist.data.codecs import CodecError

LABEL_COMPONENT = "cls"
# A larger number is an identifier, not a class.
MAX_CLASSES = 1_000_000

Label = int | str | None

_MISSING = {"", "null", "NULL", "nan", "NaN", "NAN", "None", "<NA>"}
_NUMBER = re.compile(r"[+-]?(\d{1,40}([.]\d{0,40})?|[.]\d{1,40})([eE][+-]?\d{1,2})?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,(\d+)", re.ASCII)
_TOO_LONG = re.compile(r"[+-]?\d+", re.ASCII)
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, unpaired surrogates, line separators
_SHOWN = 40


def is_printable(text: str) -> bool:
    """Return whether a name has no control characters, surrogates or line separators."""
    return text.isprintable() or not any(unicodedata.category(c) in _UNPRINTABLE for c in text)


def normalized(value: object) -> Label:
    """Return the class of a text, number, boolean or None. Raises CodecError."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # NumPy scalars and arrays
        value = value.item()
    if isinstance(value, bytes):
        value = _decoded(value)
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, float | Decimal) and math.isnan(value):
        return None
    if isinstance(value, int | float | Decimal):
        return _class_number(value, value)
    raise _no_class(value)


def _from_text(value: str) -> Label:
    text = value.strip().lstrip("\ufeff").strip()
    if not is_printable(text):
        raise _no_class(value)
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_CLASSES)):
        return _class_number(int(text), value)  # the common case
    if text in _MISSING:
        return None
    if _NUMBER.fullmatch(text):
        return _class_number(Decimal(text), value)
    if comma := _DECIMAL_COMMA.fullmatch(text):
        if len(comma[1]) == len("000"):  # may be a thousands separator
            raise _no_class(value)
        return _class_number(Decimal(text.replace(",", ".")), value)
    if _TOO_LONG.fullmatch(text):
        raise _no_class(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    return unicodedata.normalize("NFC", text)


def _class_number(number: int | float | Decimal, value: object) -> int | None:
    if number == -1:
        return None
    if not 0 <= number < MAX_CLASSES or number != int(number):
        raise _no_class(value)
    return int(number)


def _no_class(value: object) -> CodecError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return CodecError(
        f"has the label {shown}, expected an integer from 0 to {MAX_CLASSES - 1}, or a name",
        hint="Choose another column or field with --labels, or use --labels none",
    )


def decode_label(
    content: bytes | memoryview,
    num_classes: int,
    field: str = "",
    numbers: Mapping[str, int] | None = None,
) -> int:
    """Decode a class label, or with ``field`` the value of that JSON key. Raises CodecError.

    ``numbers`` are the class numbers by name; None if labels are numbers.
    """
    label = read_label(content, field)
    if label is None:
        raise CodecError("has no label", hint="Index the data again")
    if numbers is not None:
        if str(label) not in numbers:
            raise CodecError(f"is {str(label)[:_SHOWN]!r}, which is not the name of a class")
        return numbers[str(label)]
    if not isinstance(label, int):
        raise CodecError(f"is {label[:_SHOWN]!r}, expected an integer")
    if label >= num_classes:
        rule = f"is class {label}, expected 0 to {num_classes - 1}"
        raise CodecError(rule, hint="Pack again with the right labels")
    return label


def read_label(content: bytes | memoryview, field: str = "") -> Label:
    """Return the label in a file; None if unlabelled. See :func:`decode_label`."""
    text = _decoded(bytes(content))
    if not field:
        return normalized(text)
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CodecError("is not a JSON object")
    return normalized(found.get(field))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CodecError("is not UTF-8") from None
