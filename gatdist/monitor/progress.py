"""What a person sees of long work that is no training: a bar, what to know of it, and its end.

Work tells events as a kind and fields of JSON values:

============ ==========================================================================
kind         fields
============ ==========================================================================
``start``    ``message``, ``total`` (things to do, each alike), ``unit`` (their noun)
``progress`` ``done`` and ``found`` (done already) since the last such event
``note``     ``message``
``warning``  ``message``
``done``     ``message``, ``rows`` (label and text of each)
============ ==========================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from gatdist.monitor.numbers import count, duration, size
from gatdist.monitor.terminal import Terminal

Fields = Mapping[str, Any]

_DRAW_S, _SAY_S = 0.1, 10.0
_RATE_AFTER_S = 0.5  # before that, a rate would be guessed


class ProgressConsole(Terminal):
    """Shows the events of long work.

    Args:
        stream: usually standard error.
        is_terminal: whether a line may be rewritten in place, and in colours; None asks the stream.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        stream: TextIO,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream, is_terminal)
        self._clock = clock
        self._total = self._done = self._found = 0
        self._unit = ""
        self._began_s = self._shown_s = clock()
        self._show: dict[str, Callable[[Fields], None]] = {
            "start": self._start,
            "progress": self._progress,
            "note": lambda fields: self._say(fields["message"]),
            "warning": lambda fields: self._say(
                f"{self._style.alarm}warning:{self._style.end} {fields['message']}"
            ),
            "done": self._end,
        }

    def event(self, kind: str, fields: Fields) -> None:
        """Show one event; see the module's table."""
        self._show[kind](fields)

    def _start(self, fields: Fields) -> None:
        self._say(fields["message"])
        self._total, self._unit = fields["total"], fields["unit"]
        self._done = self._found = 0
        self._began_s = self._shown_s = self._clock()
        if self._is_terminal:
            self._draw()

    def _progress(self, fields: Fields) -> None:
        self._done += fields["done"]
        self._found += fields["found"]
        now_s = self._clock()
        is_last = self._done + self._found == self._total
        if now_s - self._shown_s < (_DRAW_S if self._is_terminal else _SAY_S) and not is_last:
            return
        self._shown_s = now_s
        if self._is_terminal:
            self._draw()
        elif not is_last:  # of which the summary tells
            self._say("  ".join(self._parts()))

    def _end(self, fields: Fields) -> None:
        if self._line_is_open:  # a full bar tells nothing beside the summary
            self._write(self._style.clear)
            self._line_is_open = False
        rows = [f"  {label:<10}{text}" for label, text in fields["rows"].items() if text]
        head = f"{self._style.good}done{self._style.end} {fields['message']}"
        self._say("\n".join([head, *rows]))

    def _parts(self) -> list[str]:
        shown, unit = (size, "") if self._unit == "bytes" else (count, f" {self._unit}")
        seen, total = self._done + self._found, shown(self._total)
        parts = [f"{self._share():4.0%}", f"{shown(seen):>{len(total)}}/{total}{unit}"]
        elapsed_s = self._clock() - self._began_s
        if self._done and elapsed_s > _RATE_AFTER_S:
            rate = self._done / elapsed_s
            parts.append(f"{shown(rate):>6}/s")
            parts.append(f"{duration((self._total - seen) / rate):>7} left")
        return parts

    def _line(self, columns: int) -> str:
        parts = self._parts()
        while len(parts) > 1 and len("  ".join(parts)) > columns:
            parts.pop()
        if bar := self._style.bar(self._share(), columns - len("  ".join(parts)) - 2):
            parts.insert(1, bar)
        return "  ".join(parts)

    def _share(self) -> float:
        return (self._done + self._found) / self._total if self._total else 0.0
