"""Class labels: ``.cls`` files and fields of ``.json`` files."""

from __future__ import annotations

import json

from gatdist.data.codecs.errors import CodecError

LABEL_COMPONENT = "cls"


def decode_label(content: bytes | memoryview, num_classes: int, field: str = "") -> int:
    """Decode a class label.

    Args:
        content: a decimal number, or with ``field`` a JSON object.
        num_classes: labels are below it.
        field: of the JSON object, that holds the label.

    Raises:
        CodecError: there is no such number.
    """
    text = bytes(content)
    if field:
        text = _field(text, field)
    try:
        label = int(text)
    except ValueError:
        raise CodecError(f"is {text[:40]!r}, expected a whole number") from None
    if not 0 <= label < num_classes:
        raise CodecError(
            f"is class {label}, expected 0 to {num_classes - 1}",
            mend="Pack again with the right labels",
        )
    return label


def _field(text: bytes, field: str) -> bytes:
    try:
        values = json.loads(text)
        return str(values[field]).encode()
    except (ValueError, TypeError, RecursionError):
        raise CodecError("is no JSON object") from None
    except KeyError:
        raise CodecError(f"has no field {field!r}", mend="Index again with another field") from None
