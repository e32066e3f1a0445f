"""Deletes files by their exact names, many at a time.

fsspec's ``rm`` is not used: it takes ``[ ] * ?`` in a name for a pattern, lists again, and on S3
ignores what a bulk delete reports of single files. Nor are bulk deletes, which some copies of S3
refuse; requests for single files are as cheap and run concurrently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fsspec.asyn import sync

from gatdist.storage import failures
from gatdist.storage.connection import Connection, OneOfManyError
from gatdist.storage.local import remove

_CONCURRENCY = 16


class Deletion:
    """Some files to delete, and which of them are left.

    Args:
        connection: to the folder.
        names: of files in it; those that do not exist are passed over.
    """

    def __init__(self, connection: Connection, names: Sequence[str]) -> None:
        assert all(names), "a file has a name; without one, the bucket would be meant"
        self._connection = connection
        self._names = list(names)
        self._left = list(names)

    def attempt(self, file_system: Any) -> None:
        """Delete what is left, then the folders that are empty now.

        Raises:
            OneOfManyError: some can't be deleted; one that never will, if there is such a one.
        """
        failed: list[tuple[str, Exception]] = []
        errors = self._delete(file_system)
        for name, error in zip(self._left, errors, strict=True):
            if error and not failures.is_absent(error):
                failed.append((name, error))
        before, self._left = len(self._left), [name for name, _ in failed]
        if failed:
            name, error = min(failed, key=lambda each: failures.is_passing(each[1]))
            raise OneOfManyError(name, error, progressed=len(failed) < before)
        if not file_system.async_impl:  # object stores have no folders
            self._delete_empty_folders(file_system)

    def _delete(self, file_system: Any) -> list[Exception | None]:
        paths = [self._connection.path(name) for name in self._left]
        if file_system.async_impl:
            found: list[Exception | None] = sync(file_system.loop, _each, file_system, paths)
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

    def _delete_empty_folders(self, file_system: Any) -> None:
        folders = {
            name.rsplit("/", depth)[0]
            for name in self._names
            for depth in range(1, name.count("/") + 1)
        }
        for folder in sorted(folders, reverse=True):  # the deepest first
            with suppress(OSError):
                file_system.rmdir(self._connection.path(folder))


async def _each(file_system: Any, paths: Sequence[str]) -> list[BaseException | None]:
    """Delete each; what each failed with."""
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def delete(path: str) -> None:
        async with gate:
            await file_system._rm_file(path)

    return await asyncio.gather(*map(delete, paths), return_exceptions=True)
