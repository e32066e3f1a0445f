"""Files that a run shows, such as previews and profiles: uploaded when storage takes them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gatdist.common.errors import StorageUnavailableError

if TYPE_CHECKING:
    from gatdist.storage import Store

# How long one operation is retried while training runs; at the next log interval it is tried again.
RETRY_BUDGET_S = 10.0
# A segment of what grows is uploaded when it exceeds this share of what was uploaded before, which
# bounds their number: about 100 each time the run has become 2.7 times as long.
MIN_GROWTH = 0.01
# What may wait in memory.
MAX_BYTES = 64 * 2**20


class Uploads:
    """Files that wait to be uploaded. Safe to use from several threads.

    Failures are kept, not raised: no file here is worth ending a run for.

    Args:
        store: where to.
        max_bytes: that may wait; with more, the oldest files are dropped, but never the last one.

    Attributes:
        error: of the last upload that failed; "" once none waits.
        num_dropped: files that were dropped.
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
        """How many files have not been uploaded."""
        return len(self._waiting) + self.num_dropped

    def add(self, name: str, data: bytes) -> None:
        """Have a file uploaded by the next :meth:`flush`."""
        with self._lock:
            self._waiting.pop(name, None)
            self._waiting[name] = data
            while len(self._waiting) > 1 and self._num_bytes() > self._max_bytes:
                self._waiting.pop(next(iter(self._waiting)))
                self.num_dropped += 1

    def flush(self, *, patient: bool = False) -> bool:
        """Upload what waits; what fails waits on, behind the others.

        Args:
            patient: whether to retry for as long as the store does otherwise.

        Returns:
            Whether all is uploaded.
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
                    break  # the others would most likely wait in vain, too
            else:
                with self._lock:
                    if self._waiting.get(name) is data:
                        del self._waiting[name]
        if not self._waiting:
            self.error = ""

    def _num_bytes(self) -> int:
        return sum(map(len, self._waiting.values()))
