"""Class labels: ``.cls`` and ``.txt`` files, and fields of ``.json`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gatdist.data.codecs.errors import CodecError

LABEL_COMPONENT = "cls"


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
    text = read_label(content, field)
    if numbers is not None:
        if text not in numbers:
            raise CodecError(f"is {text[:40]!r}, which is no name of a class")
        return numbers[text]
    if not (text.isascii() and text.removeprefix("-").isdecimal()):  # int() takes more, as 1_0
        raise CodecError(f"is {text[:40]!r}, expected a whole number")
    label = int(text)
    if not 0 <= label < num_classes:
        raise CodecError(
            f"is class {label}, expected 0 to {num_classes - 1}",
            mend="Pack again with the right labels",
        )
    return label


def read_label(content: bytes | memoryview, field: str = "") -> str:
    """The label as a text, without white space around it. See :func:`decode_label`.

    Raises:
        CodecError: it is not UTF-8, or no JSON object with that field.
    """
    try:
        text = bytes(content).decode()
    except UnicodeDecodeError:
        raise CodecError("is not UTF-8") from None
    if not field:
        return text.strip()
    try:
        return str(json.loads(text)[field]).strip()
    except (ValueError, TypeError, RecursionError):
        raise CodecError("is no JSON object") from None
    except KeyError:
        raise CodecError(f"has no field {field!r}", mend="Index again with another field") from None
