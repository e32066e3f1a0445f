"""A file on any storage as Python's file object, for libraries that seek and read."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from gatdist.storage import Store

# A request to an object store takes as long as reading about this much.
_BUFFER_BYTES = 256 * 2**10


class _Ranges(io.RawIOBase):
    """Reads ranges of a file, with the retries and checks of :class:`~gatdist.storage.Store`."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._size, self._position = store.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        (content,) = self._store.read_ranges([(self._name, self._position, stop)])
        buffer[: len(content)] = content
        self._position = stop
        return len(content)


def open_file(store: Store, name: str) -> BinaryIO:
    """Open a file for reading; it may be closed, but need not be.

    Raises:
        StorageError: there is no such file. Reading raises what ``Store.read_ranges`` does.
    """
    if store.is_local:
        store.size(name)  # says what is wrong in the store's words
        return store.local_path(name).open("rb")
    return cast(BinaryIO, io.BufferedReader(_Ranges(store, name), _BUFFER_BYTES))
