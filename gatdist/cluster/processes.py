"""Output and child processes of this process: redirect the one, end the others."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from gatdist.monitor.console import Console


@contextmanager
def output_to_file(path: Path, console: Console | None = None) -> Iterator[TextIO]:
    """Redirect descriptors 1 and 2 of this process and its children to the file ``path``.

    Ray writes to them from Python and from C++, so ``sys.stdout`` is not enough.

    Yields:
        A stream to the original standard error, to which ``console`` writes meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    kept = os.dup(1), os.dup(2)
    terminal = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with _shown_on(console, terminal):
            yield terminal
    finally:
        _flush()
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
        with suppress(OSError):  # the terminal was closed
            terminal.close()


@contextmanager
def _shown_on(console: Console | None, stream: TextIO) -> Iterator[None]:
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


def end_descendants() -> None:
    """Kill the children of this process, their children, and so on (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # The name, in parentheses, may hold blanks; the parent is the second field after it.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    waiting = [os.getpid()]
    while waiting:
        mine = children.get(waiting.pop(), [])
        waiting += mine
        for process in mine:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
