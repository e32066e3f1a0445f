"""Values of the command line's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gatdist.common.errors import ConfigError


def workers(text: str) -> int:
    """A number of workers, above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError("--workers", "must be a whole number above 0", value=text)
    return int(text)


def workers_range(text: str) -> int | list[int]:
    """A number of workers, ``4``, or the fewest and the most, ``2:4``."""
    numbers = text.split(":")
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ConfigError(
            "--workers", "must be a whole number above 0, or two as in 2:8", value=text
        )
    return int(text) if len(numbers) == 1 else [int(n) for n in numbers]


def profiled_steps(text: str) -> list[int]:
    """The first step and the one behind the last of ``steps=100:110``."""
    kind, _, window = text.partition("=")
    numbers = window.split(":")
    if kind != "steps" or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ConfigError("--profile", "must be steps=FIRST:STOP, as in steps=100:110", value=text)
    return [int(n) for n in numbers]


def size(text: str | None) -> tuple[int, int] | None:
    """Height and width of ``64`` or ``64x96``."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ConfigError("--size", "must be H or HxW, in pixels, such as 64 or 64x96", value=text)
    return int(numbers[0]), int(numbers[-1])


def num_bytes(text: str) -> int:
    """Bytes of ``268435456``, ``256MB`` or ``1GB``, in units of 1,000."""
    digits = text.upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(digits[-1:], 1)
    digits = digits if factor == 1 else digits[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise ConfigError("--shard-bytes", "must be bytes, such as 256MB or 1GB", value=text)
    return int(digits) * factor


def options(option: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Storage options of ``key=value``."""
    from gatdist.config import set_value

    found: dict[str, Any] = {}
    for override in overrides:
        set_value(found, override, option, "key=value")
    return found
