"""Writes in the background: training continues while storage is slow or unavailable."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs work in one thread, in the order of the calls.

    A failure is raised by a later call, at the latest by :meth:`close`. After a failure nothing
    more is done: what was to follow may depend on what failed.

    Args:
        name: Of the thread.
        max_pending: Length of the queue above which a call waits.

    Attributes:
        failed: Whether some work has failed.
    """

    def __init__(self, name: str, max_pending: int = 32) -> None:
        self._max_pending = max_pending
        self._pending: deque[Future[None]] = deque()
        self._executor = ThreadPoolExecutor(1, name)  # starts its thread with the first work
        self.failed = False
        self._working_since: float | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the present work has taken so far; 0 while idle."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, work: Callable[[], object]) -> Future[None]:
        """Queue ``work()``. Raises failures since the last call."""
        self.check()
        while len(self._pending) >= self._max_pending:
            self._pending.popleft().result()
        future = self._executor.submit(self._do, work)
        self._pending.append(future)
        return future

    def check(self) -> None:
        """Raise failures since the last call, without waiting."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait until all work is done. Raises failures since the last call."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _do(self, work: Callable[[], object]) -> None:
        if self.failed:
            return
        self._working_since = time.monotonic()
        try:
            work()
        except BaseException:
            self.failed = True
            raise
        finally:
            self._working_since = None


class Coalesced:
    """Work that a background thread runs once for all requests made while it is queued."""

    def __init__(self, background: Background, work: Callable[[], object]) -> None:
        self._background, self._work = background, work
        self._is_requested = False

    def request(self) -> None:
        """Run the work from its beginning at least once after this call, without waiting.

        Raises failures in the thread since the last call.
        """
        if self._is_requested:
            self._background.check()
            return
        self._is_requested = True
        self._background.submit(self._run)

    def _run(self) -> None:
        self._is_requested = False  # before the work: what is added meanwhile may come too late
        self._work()
