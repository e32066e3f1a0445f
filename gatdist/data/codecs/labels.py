"""Class labels. :func:`normalized` is the one rule for all sources, for ``index`` and for reading.

A label is the number of a class, the name of one, or missing:

* Blanks around it and a byte order mark do not count. ``3``, ``3.0``, ``+3``, ``3e0``, ``"3"`` and,
  as written where a comma is the decimal point, ``3,0`` are the number 3.
* −1, null, NaN and an empty text mean that a sample is not labelled.
* ``true`` and ``false`` are names, in whatever case they are written.
* Any other text is a name, in Unicode's form NFC. So are digits that are not ASCII.
* Names with control characters are no classes: they would spoil terminals, tables and file names.
* Other numbers (0.5, −2, 1,000,000 and above) and other values (lists, objects) are no classes.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

from gatdist.common.strict_json import parse_json
from gatdist.data.codecs.errors import CodecError

LABEL_COMPONENT = "cls"
# Past this it is no class but an identity number, and a network could not embed it.
MOST_CLASSES = 1_000_000

Label = int | str | None

_MISSING = {"", "null", "NULL", "nan", "NaN", "NAN", "None", "<NA>"}
_NUMBER = re.compile(r"[+-]?(\d{1,40}([.]\d{0,40})?|[.]\d{1,40})([eE][+-]?\d{1,2})?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,(\d+)", re.ASCII)
_TOO_LONG = re.compile(r"[+-]?\d+", re.ASCII)
_UNFIT = ("Cc", "Cs")  # control characters, and unpaired surrogates, which JSON may hold
_SHOWN = 40


def normalized(value: object) -> Label:
    """The class that a label means: a number from 0, a name, or None where it means none.

    Args:
        value: a text, or what JSON, Parquet or NumPy has: a number, a truth value, None.

    Raises:
        CodecError: it is no class.
    """
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # NumPy's scalars and arrays
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
    if not text.isprintable() and any(unicodedata.category(c) in _UNFIT for c in text):
        raise _no_class(value)
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_CLASSES)):
        return _class_number(int(text), value)  # what nearly all are
    if text in _MISSING:
        return None
    if _NUMBER.fullmatch(text):
        return _class_number(Decimal(text), value)
    if comma := _DECIMAL_COMMA.fullmatch(text):
        if len(comma[1]) == len("000"):  # or a thousand
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
    if not 0 <= number < MOST_CLASSES or number != int(number):
        raise _no_class(value)
    return int(number)


def _no_class(value: object) -> CodecError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    rule = f"a whole number from 0 to {MOST_CLASSES - 1}, or a name"
    return CodecError(
        f"has the label {shown}, which is no class ({rule})",
        hint="Name another column or field with --labels, or leave labels out with --labels none",
    )


def decode_label(
    content: bytes | memoryview,
    num_classes: int,
    field: str = "",
    numbers: Mapping[str, int] | None = None,
) -> int:
    """Decode a class label.

    Args:
        content: the number or the name, or with ``field`` a JSON object that holds it.
        num_classes: labels are below it.
        field: of the JSON object, that holds the label.
        numbers: of the classes, by their names; None where they are numbers.

    Raises:
        CodecError: there is no such number or name.
    """
    label = read_label(content, field)
    if label is None:
        raise CodecError("has no label", hint="Index the data again")
    if numbers is not None:
        if str(label) not in numbers:
            raise CodecError(f"is {str(label)[:_SHOWN]!r}, which is no name of a class")
        return numbers[str(label)]
    if not isinstance(label, int):
        raise CodecError(f"is {label[:_SHOWN]!r}, expected a whole number")
    if label >= num_classes:
        raise CodecError(
            f"is class {label}, expected 0 to {num_classes - 1}",
            hint="Pack again with the right labels",
        )
    return label


def read_label(content: bytes | memoryview, field: str = "") -> Label:
    """The label in a file; None where it has none. See :func:`decode_label`.

    Raises:
        CodecError: it is not UTF-8, no JSON object, or its label is no class.
    """
    text = _decoded(bytes(content))
    if not field:
        return normalized(text)
    try:
        found = parse_json(text)
    except ValueError:
        raise CodecError("is no JSON object") from None
    if not isinstance(found, dict):
        raise CodecError("is no JSON object")
    return normalized(found.get(field))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CodecError("is not UTF-8") from None
