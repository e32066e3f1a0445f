"""Shards opened for reading, as many as there is memory for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from gatdist.data.shard import OpenShard


class OpenShards:
    """Shards by number, each opened when it is first needed. Safe to use from several threads.

    Args:
        opened: opens the shard of a number.
        max_bytes: those unused for longest are closed when their indexes take more than this; the
            one used last stays.
    """

    def __init__(self, opened: Callable[[int], OpenShard], max_bytes: int) -> None:
        self._open, self._max_bytes = opened, max_bytes
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._num_bytes = 0
        self._being_opened: set[int] = set()
        self._changed = threading.Condition()

    def __getitem__(self, number: int) -> OpenShard:
        """The shard of that number.

        Raises:
            DataError: see :class:`OpenShard`.
            StorageError: it can't be read.
        """
        with self._changed:
            while number in self._being_opened:
                self._changed.wait()
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
            self._being_opened.add(number)
        try:
            shard = self._open(number)
            with self._changed:
                self._shards[number] = shard
                self._num_bytes += shard.num_bytes
                while self._num_bytes > self._max_bytes and len(self._shards) > 1:
                    _, closed = self._shards.popitem(last=False)
                    self._num_bytes -= closed.num_bytes
            return shard
        finally:
            with self._changed:
                self._being_opened.remove(number)
                self._changed.notify_all()
