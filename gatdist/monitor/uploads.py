"""Uploads of a run's previews, profiles and other files, which may fail and are retried."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gatdist.common.errors import StorageUnavailableError

if TYPE_CHECKING:
    from gatdist.storage import Store

# Retries of one operation while training runs; the next log interval tries again.
RETRY_BUDGET_S = 10.0
# A segment is uploaded when it exceeds this share of what was uploaded before, which bounds their
# number: about 100 each time the run becomes 2.7 times as long.
MIN_GROWTH = 0.01
# Pending bytes in memory.
MAX_BYTES = 64 * 2**20


class Uploads:
    """Pending files. Thread-safe. Failures are kept, not raised.

    Beyond ``max_bytes`` of pending files, the oldest are dropped, but never the last one. ``error``
    is that of the last failed upload; "" once none is pending.
    """

    def __init__(self, store: Store, max_bytes: int = MAX_BYTES) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._hasty = store.with_retry_budget(RETRY_BUDGET_S)
        self._waiting: dict[str, bytes] = {}
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self.error = ""
        self.num_dropped = 0

    @property
    def missing(self) -> int:
        return len(self._waiting) + self.num_dropped

    def add(self, name: str, data: bytes) -> None:
        with self._lock:
            self._waiting.pop(name, None)
            self._waiting[name] = data
            while (
                len(self._waiting) > 1 and sum(map(len, self._waiting.values())) > self._max_bytes
            ):
                self._waiting.pop(next(iter(self._waiting)))
                self.num_dropped += 1

    def flush(self, *, patient: bool = False) -> bool:
        """Upload pending files; those that fail are queued again. Return whether all are uploaded.

        ``patient`` retries as long as the store usually does.
        """
        with self._flushing:
            self._flush(self._store if patient else self._hasty)
        return not self._waiting

    def _flush(self, store: Store) -> None:
        for name in list(self._waiting):
            data = self._waiting.get(name)
            if data is None:
                continue
            try:
                store.publish(name, data)
            except Exception as error:
                self.error = str(error)
                with self._lock:
                    if self._waiting.get(name) is data:
                        self._waiting[name] = self._waiting.pop(name)
                if isinstance(error, StorageUnavailableError):
                    break  # the others would most likely fail, too
            else:
                with self._lock:
                    if self._waiting.get(name) is data:
                        del self._waiting[name]
        if not self._waiting:
            self.error = ""
