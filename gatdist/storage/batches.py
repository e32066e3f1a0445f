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


def read_ranges(
    connection: Connection,
    size: Callable[[str], int],
    ranges: Sequence[tuple[str, int, int]],
    concurrency: int,
) -> list[bytes]:
    """Return ranges (name, start, stop) of files on a server; ``size`` is that of a file."""
    found = {i: b"" for i, (_, start, stop) in enumerate(ranges) if start == stop}
    ignored: set[int] = set()  # answered with other bytes

    def fetch(file_system: Any) -> None:
        missing = [i for i in range(len(ranges)) if i not in found]
        if not missing:
            return
        names, starts, stops = zip(*(ranges[i] for i in missing), strict=True)
        limit = {"batch_size": concurrency} if file_system.async_impl else {}
        paths = [connection.path(name) for name in names]
        contents = file_system.cat_ranges(
            paths, list(starts), list(stops), on_error="return", **limit
        )
        failed: list[tuple[str, Exception]] = []
        for i, content in zip(missing, contents, strict=True):
            name, start, stop = ranges[i]
            if isinstance(content, bytes) and len(content) == stop - start:
                found[i] = content
            else:
                failed.append((name, failure(i, content)))
        _raise_failed(failed, len(missing))

    def failure(i: int, content: object) -> Exception:
        name, start, stop = ranges[i]
        if isinstance(content, bytes) and len(content) > stop - start:
            content = failures.RangeIgnoredError(
                f"gave {len(content)} bytes for the range {start} to {stop}"
            )
        if isinstance(content, failures.RangeIgnoredError):
            if i in ignored:  # the first time may be due to a cache being filled
                hint = "The server ignores ranges: use one that supports them, or copy the files"
                return StorageError(connection.shown(name), str(content), hint=hint)
            ignored.add(i)
        if isinstance(content, Exception):
            if failures.answer(content).status != 416:
                return content
            content = b""  # it begins after the end
        assert isinstance(content, bytes), content
        if (length := size(name)) < stop:
            return truncated(connection.shown(name), start, stop, content, length)
        return failures.LostError(f"{len(content)} of {stop - start} bytes arrived")

    connection.run("", fetch)
    return [found[i] for i in range(len(ranges))]


def truncated(url: str, start: int, stop: int, content: bytes, size: int) -> StorageError:
    """Return the error of a file that ends before ``stop``."""
    return StorageError(
        url,
        f"gave {len(content)} bytes for the range {start} to {stop} (of {size})",
        hint="The file is truncated, or was replaced",
    )


def delete_files(connection: Connection, names: Sequence[str]) -> None:
    """Delete files by their exact names, if they exist, then empty folders.

    fsspec's ``rm`` takes ``[ ] * ?`` in a name for a pattern, and ignores what a bulk delete on S3
    reports of single files. Some S3-compatible servers refuse bulk deletes.
    """
    assert all(names), "an empty name would mean the bucket"
    left = list(names)

    def attempt(file_system: Any) -> None:
        nonlocal left
        errors = _delete(connection, file_system, left)
        failed = [
            (name, error)
            for name, error in zip(left, errors, strict=True)
            if error and not failures.is_absent(error)
        ]
        before, left = len(left), [name for name, _ in failed]
        _raise_failed(failed, before)
        if not file_system.async_impl:  # object stores have no folders
            folders = {
                name.rsplit("/", depth)[0]
                for name in names
                for depth in range(1, name.count("/") + 1)
            }
            for folder in sorted(folders, reverse=True):  # the deepest first
                with suppress(OSError):
                    file_system.rmdir(connection.path(folder))

    connection.run("", attempt)


def _delete(
    connection: Connection, file_system: Any, names: Sequence[str]
) -> list[Exception | None]:
    paths = [connection.path(name) for name in names]
    if file_system.async_impl:
        found: list[Exception | None] = sync(file_system.loop, _delete_each, file_system, paths)
        return found
    errors: list[Exception | None] = []
    for name, path in zip(names, paths, strict=True):
        try:
            if connection.is_local:
                remove(connection.root, name)
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
