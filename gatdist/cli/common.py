"""Shared by the commands: options, values of options, and output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gatdist.common.errors import ConfigError

Parser = argparse.ArgumentParser


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], text: str
) -> Parser:
    """Add a command that calls ``function``."""
    description = f"{text[0].upper()}{text[1:]}."
    sub: Parser = commands.add_parser(name, help=text, description=description)
    sub.set_defaults(command=function)
    sub.add_argument(
        "--json", action="store_true", help="print exactly one JSON document on standard output"
    )
    return sub


def add_options(sub: Any, options: dict[str, str], **settings: Any) -> None:
    """Add options with a value: help by option and metavar, such as ``--size H[xW]``."""
    for option, text in options.items():
        name, metavar = option.split()
        sub.add_argument(name, metavar=metavar, help=text, **settings)


def add_repeated(sub: Any, option: str, metavar: str, text: str) -> None:
    """Add an option whose values are gathered in a list."""
    text = f"{text}; repeatable"
    sub.add_argument(option, action="append", default=[], metavar=metavar, help=text)


def add_overrides(sub: Parser, text: str) -> None:
    """Add ``--set`` for keys of a configuration."""
    add_repeated(sub, "--set", "SECTION.KEY=VALUE", text)


def add_storage_options(sub: Parser, option: str, place: str) -> None:
    """Add an option for how to reach ``place``; :func:`storage_options` reads it."""
    add_repeated(sub, option, "KEY=VALUE", f"storage option of {place}, such as anon=true")


def storage_options(arguments: argparse.Namespace, option: str) -> dict[str, Any]:
    """Return the values of an option that :func:`add_storage_options` added."""
    from gatdist.config import set_value

    found: dict[str, Any] = {}
    for override in getattr(arguments, option.removeprefix("--").replace("-", "_")):
        set_value(found, override, option, "key=value")
    return found


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """Return the values of a repeated option, such as ``NAME=WHERE``, by name."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or name in found:
            rule = "is given twice" if separator else "must be NAME=WHERE"
            raise ConfigError(option, rule, value=text)
        found[name] = value
    return found


def add_allowed_origins(sub: Any) -> None:
    """Add ``--allow-origin``."""
    text = (
        "a server, bucket or local folder that a list may name besides its own, such as "
        "https://images.example or /data/images"
    )
    add_repeated(sub, "--allow-origin", "URL", text)


def add_address(sub: Parser) -> None:
    """Add ``--address``."""
    text = "work on a Ray cluster, such as auto or HOST:PORT; local starts one here"
    sub.add_argument("--address", default="", metavar="RAY", help=text)


def add_strict(sub: Parser) -> None:
    """Add ``--strict``."""
    text = "fail if any sample can't be used, and name them"
    sub.add_argument("--strict", action="store_true", help=text)


def add_processes(sub: Parser) -> None:
    """Add ``--workers``; :func:`processes` reads it."""
    sub.add_argument("--workers", metavar="N", help="processes (default: one per core)")


def processes(arguments: argparse.Namespace) -> int | None:
    """Return the number of processes; None without the option."""
    text: str | None = arguments.workers
    if text is None:
        return None
    if not _are_positive([text]):
        raise ConfigError("--workers", "must be a whole number above 0", value=text)
    return int(text)


def workers_range(text: str) -> int | list[int]:
    """Return a number of workers, ``4``, or the fewest and the most, ``2:4``."""
    numbers = text.split(":")
    if len(numbers) > 2 or not _are_positive(numbers):
        rule = "must be a whole number above 0, or two as in 2:8"
        raise ConfigError("--workers", rule, value=text)
    return int(text) if len(numbers) == 1 else [int(n) for n in numbers]


def profiled_steps(text: str) -> list[int]:
    """Return the first step, and the one after the last, of ``steps=100:110``."""
    kind, _, window = text.partition("=")
    numbers = window.split(":")
    if kind != "steps" or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ConfigError("--profile", "must be steps=FIRST:STOP, as in steps=100:110", value=text)
    return [int(n) for n in numbers]


def image_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of ``64`` or ``64x96``."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not _are_positive(numbers):
        raise ConfigError("--size", "must be H or HxW, in pixels, such as 64 or 64x96", value=text)
    return int(numbers[0]), int(numbers[-1])


def num_bytes(text: str) -> int:
    """Return the bytes of ``268435456``, ``256MB`` or ``1GB``, in units of 1,000."""
    digits = text.upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(digits[-1:], 1)
    digits = digits if factor == 1 else digits[:-1]
    if not _are_positive([digits]):
        raise ConfigError("--shard-bytes", "must be bytes, such as 256MB or 1GB", value=text)
    return int(digits) * factor


def _are_positive(numbers: Sequence[str]) -> bool:
    return all(n.isdecimal() and int(n) > 0 for n in numbers)


def print_result(
    arguments: argparse.Namespace, found: Any, described: Callable[[Any], str] | None = None
) -> None:
    """Print a result as JSON with ``--json``, else as text, or not at all."""
    if arguments.json:
        print(json.dumps(found))
    elif described:
        print(described(found))


def log(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)
