"""JSON that others may have written."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, *, int64: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: UTF-8 if bytes.
        int64: refuse integers of more than 64 bits.

    Raises:
        ValueError: not JSON, nested too deep, or an integer is too large.
    """
    try:
        return json.loads(text, parse_int=_int64 if int64 else None)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def _int64(text: str) -> int:
    if len(text) > len(str(-(2**63))) or not -(2**63) <= int(text) < 2**63:
        raise ValueError("holds an integer of more than 64 bits")
    return int(text)
