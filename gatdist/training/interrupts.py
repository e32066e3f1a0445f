"""Ctrl-C, SIGTERM, a hang-up: the first asks for a checkpoint and an end, the second leaves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from gatdist.errors import InterruptedRunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Context in which the signals are ours; afterwards the old handlers are back.

    A hang-up that is ignored, as ``nohup`` has it, stays ignored.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        emit: tells people what the first signal does.
        before_leaving: called at the second, just before the process ends with status 75.
    """

    def __init__(
        self,
        emit: Callable[[str, dict[str, Any]], None],
        before_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._emit, self._before_leaving = emit, before_leaving
        self._event = threading.Event()
        self._old: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._event.is_set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ours = [n for n in _SIGNALS if n != signal.SIGHUP or not _ignored(n)]
            self._old = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested():
            self._before_leaving()
            os._exit(InterruptedRunError.exit_status)
        self._event.set()
        self._emit(
            "note", {"message": "stopping after a checkpoint; press Ctrl-C again to leave at once"}
        )


def _ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
