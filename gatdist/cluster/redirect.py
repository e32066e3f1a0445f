"""Keeps the noise of libraries out of the user's terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from gatdist.monitor.console import Console


@contextmanager
def output_to_file(path: Path) -> Iterator[TextIO]:
    """Send what this process and its children write on descriptors 1 and 2 to the file ``path``.

    Ray writes there from Python and from C++, so nothing less than the descriptors will do.

    Yields:
        A stream that still writes where standard error wrote before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    kept = os.dup(1), os.dup(2)
    terminal = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    finally:
        _flush()
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
        with suppress(OSError):  # what it holds can't be shown on a terminal that was closed
            terminal.close()


@contextmanager
def shown_on(console: Console | None, stream: TextIO) -> Iterator[None]:
    """Let the console write to ``stream`` for a while."""
    if console is None:
        yield
        return
    usual, console.stream = console.stream, stream
    try:
        yield
    finally:
        console.close()
        console.stream = usual


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
