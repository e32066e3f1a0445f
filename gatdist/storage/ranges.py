"""Ranges of files on a server, asked for again one by one until all have come whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gatdist.common.errors import StorageError
from gatdist.storage import failures
from gatdist.storage.connection import Connection, OneOfManyError

Range = tuple[str, int, int]


class RequestedRanges:
    """Some ranges (name, start, stop), and what has come of them.

    Args:
        connection: to the folder.
        size: bytes of a file, by name.
        ranges: with 0 ≤ start ≤ stop.
        concurrency: requests under way at the same time.
    """

    def __init__(
        self,
        connection: Connection,
        size: Callable[[str], int],
        ranges: Sequence[Range],
        concurrency: int,
    ) -> None:
        self._connection, self._size = connection, size
        self._ranges, self._concurrency = ranges, concurrency
        self._found = {i: b"" for i, (_, start, stop) in enumerate(ranges) if start == stop}
        self._ignored: set[int] = set()  # for which other bytes came than those asked for

    def contents(self) -> list[bytes]:
        """What has come, in the order asked."""
        return [self._found[i] for i in range(len(self._ranges))]

    def fetch(self, file_system: Any) -> None:
        """Ask for those that have not come yet.

        Raises:
            OneOfManyError: some did not come; one that never will, if there is such a one.
        """
        missing = [i for i in range(len(self._ranges)) if i not in self._found]
        if not missing:
            return
        names, starts, stops = zip(*(self._ranges[i] for i in missing), strict=True)
        limit = {"batch_size": self._concurrency} if file_system.async_impl else {}
        paths = [self._connection.path(name) for name in names]
        contents = file_system.cat_ranges(
            paths, list(starts), list(stops), on_error="return", **limit
        )
        failed: list[tuple[str, Exception]] = []
        for i, content in zip(missing, contents, strict=True):
            name, start, stop = self._ranges[i]
            if isinstance(content, bytes) and len(content) == stop - start:
                self._found[i] = content
            else:
                failed.append((name, self._error(i, content)))
        if failed:
            name, error = min(failed, key=lambda each: failures.is_passing(each[1]))
            raise OneOfManyError(name, error, progressed=len(failed) < len(missing))

    def _error(self, i: int, content: object) -> Exception:
        """What is wrong with what came for a range."""
        name, start, stop = self._ranges[i]
        if isinstance(content, bytes) and len(content) > stop - start:
            content = failures.RangeIgnoredError(
                f"gave {len(content)} bytes for the range {start} to {stop}"
            )
        if isinstance(content, failures.RangeIgnoredError):
            if i in self._ignored:  # once may be a cache on the way that was being filled
                hint = "The server ignores ranges: use one that knows them, or copy the files"
                return StorageError(self._connection.shown(name), str(content), hint=hint)
            self._ignored.add(i)
        if isinstance(content, Exception) and failures.answer(content).status == 416:
            content = b""  # it begins after the end
        if isinstance(content, Exception):
            return content
        assert isinstance(content, bytes), content
        if (size := self._size(name)) < stop:
            return cut_short(self._connection.shown(name), start, stop, content, size)
        return failures.LostError(f"{len(content)} of {stop - start} bytes arrived")


def cut_short(url: str, start: int, stop: int, content: bytes, size: int) -> StorageError:
    """What is told of a file that ends before ``stop``."""
    return StorageError(
        url,
        f"gave {len(content)} bytes for the range {start} to {stop} (of {size})",
        hint="The file is cut short, or was replaced by another",
    )
