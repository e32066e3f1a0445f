"""Memory for batches, used again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray


class Buffers:
    """Arrays of one shape. Fresh memory costs a page fault every 4 KiB, which is what this saves.

    Args:
        make: makes one.
        most: so many are kept for another use.
    """

    def __init__(self, make: Callable[[], NDArray[Any]], most: int) -> None:
        self._make = make
        self._free: deque[NDArray[Any]] = deque(maxlen=most)

    def take(self) -> NDArray[Any]:
        """An array of any content. When nobody refers to it any more, its memory is used again."""
        memory = self._free.popleft() if self._free else self._make()
        # What is handed out is a view. A tensor made of it refers to it, for as long as the tensor
        # or a view of that lives.
        array = memory[...]
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
