"""Ctrl-C and SIGTERM: the first asks for a checkpoint and an end, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from gatdist.errors import InterruptedRunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which both signals are ours; afterwards the old handlers are back.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        emit: tells people what the first signal does.
        on_request: called at the first signal.
        before_leaving: called at the second, just before the process ends with status 75.
    """

    def __init__(
        self,
        emit: Callable[[str, dict[str, Any]], None],
        on_request: Callable[[], None] = lambda: None,
        before_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self._emit, self._on_request, self._before_leaving = emit, on_request, before_leaving
        self._event = threading.Event()
        self._old: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._event.is_set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
        self._on_request()
