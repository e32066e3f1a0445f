"""Signals: the first ends training after a checkpoint, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from gatdist.common.errors import InterruptedRunError, Interruption

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S = 0.1
# A training loop between steps stops by itself within this.
_PATIENCE_S = 0.8
# Then the main thread is interrupted; if that has no effect, the process ends.
_LEAVE_S = 2.5


class Interrupts:
    """Handle SIGINT, SIGTERM and SIGHUP in this context.

    After the first signal, :meth:`requested` is true, and training ends after a checkpoint. Where
    nothing is to be saved (at the start, or in an evaluation, whose checkpoint is complete), the
    main thread is interrupted and leaves this context, which raises InterruptedRunError; if it is
    in code that can't be interrupted, the process ends with status 75. A second signal ends it at
    once.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored. Outside the main thread, where
    Python allows no handlers, it does nothing.

    Attributes:
        is_saved: returns whether no progress would be lost if the process ended now.
        is_ending: returns whether the main thread is about to end by itself.
        before_leaving: called just before the process ends with status 75.
    """

    def __init__(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._emit = emit
        self.is_saved: Callable[[], bool] = lambda: True
        self.is_ending: Callable[[], bool] = lambda: False
        self.before_leaving: Callable[[], None] = lambda: None
        self._event, self._over = threading.Event(), threading.Event()
        self._raises = False
        self._old: dict[int, Any] = {}

    def requested(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [n for n in _SIGNALS if n != signal.SIGHUP or not _ignored(n)]
            self._old = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def renew(self) -> None:
        """Set the handlers again, which a library may have replaced."""
        for number in self._old:
            signal.signal(number, self._handle)

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        self._over.set()
        self._raises = False
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if isinstance(error, Interruption):
            raise InterruptedRunError(
                "interrupted; all progress is saved, and the same command resumes"
            ) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raises:
            self._raises = False
            raise Interruption
        if self.requested():
            self._leave()
        self._event.set()
        threading.Thread(target=self._interrupt, name="interrupts", daemon=True).start()
        self._emit(
            "note", {"message": "stopping after a checkpoint; press Ctrl-C again to stop at once"}
        )

    def _interrupt(self) -> None:
        """Interrupt the main thread once there is nothing to save."""
        saved_since: float | None = None
        while not self._over.wait(_LOOK_S):
            if not self.is_saved():
                saved_since = None
                continue
            now = time.monotonic()
            saved_since = saved_since or now
            if now - saved_since > _LEAVE_S:
                self._leave()
            if now - saved_since > _PATIENCE_S and not self.is_ending():
                self._raises = True
                # A signal, since that also wakes a thread that waits for a lock.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _leave(self) -> None:
        self.before_leaving()
        os._exit(InterruptedRunError.exit_status)


def _ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
