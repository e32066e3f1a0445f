"""Operations on many files at a time, which repeat only those that failed: ranges and deletions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fsspec.asyn import sync

from gatdist.common.errors import StorageError
from gatdist.storage import failures
from gatdist.storage.connection import Connection, OneOfManyError
from gatdist.storage.local import remove

_CONCURRENCY = 16


def _raise_failed(failed: Sequence[tuple[str, Exception]], attempted: int) -> None:
    """Raise OneOfManyError for one of the failures, preferably a permanent one."""
    if failed:
        name, error = min(failed, key=lambda each: failures.is_transient(each[1]))
        raise OneOfManyError(name, error, progressed=len(failed) < attempted)


class RequestedRanges:
    """Ranges (name, start, stop) of files on a server; ``size`` returns the bytes of a file."""

    def __init__(
        self,
        connection: Connection,
        size: Callable[[str], int],
        ranges: Sequence[tuple[str, int, int]],
        concurrency: int,
    ) -> None:
        self._connection, self._size = connection, size
        self._ranges, self._concurrency = ranges, concurrency
        self._found = {i: b"" for i, (_, start, stop) in enumerate(ranges) if start == stop}
        self._ignored: set[int] = set()  # answered with other bytes

    def contents(self) -> list[bytes]:
        return [self._found[i] for i in range(len(self._ranges))]

    def fetch(self, file_system: Any) -> None:
        """Request the missing ranges. Raises OneOfManyError if some did not arrive."""
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
        _raise_failed(failed, len(missing))

    def _error(self, i: int, content: object) -> Exception:
        name, start, stop = self._ranges[i]
        if isinstance(content, bytes) and len(content) > stop - start:
            content = failures.RangeIgnoredError(
                f"gave {len(content)} bytes for the range {start} to {stop}"
            )
        if isinstance(content, failures.RangeIgnoredError):
            if i in self._ignored:  # the first time may be due to a cache being filled
                hint = "The server ignores ranges: use one that supports them, or copy the files"
                return StorageError(self._connection.shown(name), str(content), hint=hint)
            self._ignored.add(i)
        if isinstance(content, Exception) and failures.answer(content).status == 416:
            content = b""  # it begins after the end
        if isinstance(content, Exception):
            return content
        assert isinstance(content, bytes), content
        if (size := self._size(name)) < stop:
            return truncated(self._connection.shown(name), start, stop, content, size)
        return failures.LostError(f"{len(content)} of {stop - start} bytes arrived")


def truncated(url: str, start: int, stop: int, content: bytes, size: int) -> StorageError:
    """Return the error of a file that ends before ``stop``."""
    return StorageError(
        url,
        f"gave {len(content)} bytes for the range {start} to {stop} (of {size})",
        hint="The file is truncated, or was replaced",
    )


class Deletion:
    """Files to delete by their exact names; absent ones are skipped.

    fsspec's ``rm`` takes ``[ ] * ?`` in a name for a pattern, and ignores what a bulk delete on S3
    reports of single files. Some S3-compatible servers refuse bulk deletes.
    """

    def __init__(self, connection: Connection, names: Sequence[str]) -> None:
        assert all(names), "an empty name would mean the bucket"
        self._connection = connection
        self._names = list(names)
        self._left = list(names)

    def attempt(self, file_system: Any) -> None:
        """Delete the remaining files, then empty folders. Raises OneOfManyError if some fail."""
        errors = self._delete(file_system)
        failed = [
            (name, error)
            for name, error in zip(self._left, errors, strict=True)
            if error and not failures.is_absent(error)
        ]
        before, self._left = len(self._left), [name for name, _ in failed]
        _raise_failed(failed, before)
        if not file_system.async_impl:  # object stores have no folders
            folders = {
                name.rsplit("/", depth)[0]
                for name in self._names
                for depth in range(1, name.count("/") + 1)
            }
            for folder in sorted(folders, reverse=True):  # the deepest first
                with suppress(OSError):
                    file_system.rmdir(self._connection.path(folder))

    def _delete(self, file_system: Any) -> list[Exception | None]:
        paths = [self._connection.path(name) for name in self._left]
        if file_system.async_impl:
            found: list[Exception | None] = sync(file_system.loop, _delete_each, file_system, paths)
            return found
        errors: list[Exception | None] = []
        for name, path in zip(self._left, paths, strict=True):
            try:
                if self._connection.is_local:
                    remove(self._connection.root, name)
                else:
                    file_system.rm_file(path)
                errors.append(None)
            except Exception as error:
                errors.append(error)
        return errors


async def _delete_each(file_system: Any, paths: Sequence[str]) -> list[BaseException | None]:
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def delete(path: str) -> None:
        async with gate:
            await file_system._rm_file(path)

    return await asyncio.gather(*map(delete, paths), return_exceptions=True)
