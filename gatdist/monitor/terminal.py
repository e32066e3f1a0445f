"""Lines on a terminal, the last of which may be written anew; plain lines elsewhere."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Self, TextIO

from gatdist.common.errors import for_terminal

_FALLBACK_COLUMNS = 80
_BAR_COLUMNS = 24
MIN_BAR_COLUMNS = 6


class Terminal:
    """Where progress is shown; a context manager, which leaves the cursor on a fresh line.

    Args:
        stream: usually standard error.
        is_terminal: whether a line may be rewritten in place, and in colours; None asks the stream.
    """

    def __init__(self, stream: TextIO, is_terminal: bool | None = None) -> None:
        self.stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        signs = "unicode" if "utf" in (stream.encoding or "").lower() else "ascii"
        self._style = _STYLES[signs if self._is_terminal else "plain"]
        self._line_is_open = False  # the cursor stands behind a progress line

    def close(self) -> None:
        """Leave the cursor on a fresh line; the last progress stays to be read."""
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, columns: int) -> str:
        """The progress line, of at most so many columns."""
        raise NotImplementedError

    def _say(self, text: str) -> None:
        """Text on lines of its own, above the progress line."""
        clear = self._style.clear if self._line_is_open else ""
        self._write(f"{clear}{for_terminal(text)}\n")
        if self._line_is_open:
            self._draw()

    def _draw(self) -> None:
        self._write(self._style.clear + self._line(self._columns() - 1))
        self._line_is_open = True

    def _write(self, text: str) -> None:
        # A terminal that was closed is no reason to stop what it showed. Nor is a signal in the
        # middle of a write, whose handler has something to say: that is a RuntimeError. A stream
        # that was closed in Python is a ValueError.
        with suppress(OSError, RuntimeError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def _columns(self) -> int:
        if not self._is_terminal:
            return 10_000
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):  # a stream without a descriptor
            columns = 0
        return columns or _FALLBACK_COLUMNS


@dataclass(frozen=True)
class Style:
    """Control sequences and signs; all empty where lines are plain."""

    clear: str = ""
    full: str = ""
    empty: str = ""
    dim: str = ""
    good: str = ""
    alarm: str = ""
    end: str = ""
    arrow: str = "->"

    def bar(self, share: float, columns: int) -> str:
        """A bar that is full to ``share``, of at most so many columns; "" where it has no room."""
        columns = min(columns, _BAR_COLUMNS)
        if columns < MIN_BAR_COLUMNS:
            return ""
        full = round(columns * share)
        done, to_go = self.full * full, self.empty * (columns - full)
        return f"{self.good}{done}{self.end}{self.dim}{to_go}{self.end}"


_COLOURS = {
    "dim": "\x1b[2m",
    "good": "\x1b[32m",
    "alarm": "\x1b[1;33m",
    "end": "\x1b[0m",
    "clear": "\r\x1b[K",
}
_STYLES = {
    "plain": Style(),
    "ascii": Style(**_COLOURS, full="#", empty="."),
    "unicode": Style(**_COLOURS, full="━", empty="─", arrow="→"),
}
