"""A folder at any URL: local paths, ``memory://``, ``s3://`` and what else fsspec knows.

Two promises hold on every kind of storage: what is published is seen whole or not at all, and an
operation that fails for a passing reason is tried again, with jittered exponential back-off, until
its time is used up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from gatdist.errors import StorageError
from gatdist.storage import failures
from gatdist.storage.connection import Connection
from gatdist.storage.local import TEMPORARY, OpenFiles, replace, walk
from gatdist.storage.ranges import WantedRanges, cut_short


class Store:
    """A folder, which need not exist yet.

    Names are paths inside it, with ``/``; ``""`` is the folder itself. Safe to use from several
    threads, and after a fork in both processes. ``${env:NAME}`` in ``url`` and ``options`` is
    replaced at once, and never shown.

    Credentials that have expired are looked up anew, once an operation: where the cloud's library
    looks for them, and in the environment.

    By HTTP(S) files are only read, from servers that know ranges. A listing is made of the links
    of the folder's page, if there is one; files whose names are known need none. Names may be as in
    a URL, quoted and with a query.

    Args:
        url: a path, or any URL that fsspec knows.
        options: passed to the fsspec file system; S3 takes ``key``, ``secret`` and
            ``client_kwargs = { endpoint_url = "…" }``, or the usual ``AWS_*`` variables.
        retry_budget_s: for how long an operation is tried again after it first failed.
        stall_s: a connection on which nothing comes for so long counts as lost. Of S3, GCS, Azure
            and HTTP; other file systems have their own limits, or none.

    Attributes:
        url: as given, but without passwords: to be shown.

    Raises:
        StorageError: the protocol is not known or its package not installed, or an option is wrong.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        *,
        retry_budget_s: float = 60.0,
        stall_s: float = 30.0,
    ) -> None:
        self._connection = Connection(
            url, options or {}, retry_budget_s=retry_budget_s, stall_s=stall_s
        )
        self._anew: Callable[..., Store] = partial(
            Store, options=options, retry_budget_s=retry_budget_s, stall_s=stall_s
        )
        self._files = OpenFiles()
        self.url = self._connection.shown()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._anew, (self._connection.url,)

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return self._connection.is_local

    def local_path(self, name: str = "") -> Path:
        """Where ``name`` is on this machine's file system; only for a local store."""
        assert self.is_local, f"{self.url} is not local"
        return Path(self._connection.path(name))

    def child(self, name: str) -> Store:
        """The folder ``name`` in this one."""
        return self._anew(self._connection.child_url(name))

    def with_retry_budget(self, retry_budget_s: float) -> Store:
        """The same folder, with another limit on how long an operation is retried."""
        return partial(self._anew, retry_budget_s=retry_budget_s)(self._connection.url)

    def read(self, name: str) -> bytes:
        """The whole content of a file.

        Raises:
            StorageError: it does not exist or may not be read.
            StorageUnavailableError: storage kept failing. So do all methods below.
        """
        content: bytes = self._connection.run(
            name, lambda fs: fs.cat_file(self._connection.path(name))
        )
        return content

    def read_ranges(
        self, ranges: Sequence[tuple[str, int, int]], *, concurrency: int = 16
    ) -> list[bytes]:
        """Bytes ``start`` (inclusive) to ``stop`` (exclusive) of files, many at a time.

        Each range is a request of its own: join those that lie close together before. Of a local
        file, the newest version is read.

        Args:
            ranges: (name, start, stop), with 0 ≤ start ≤ stop.
            concurrency: requests under way at the same time. fsspec would make over a thousand,
                more than servers and limits of open files bear.

        Returns:
            Each range, in the order asked, of exactly the length asked.

        Raises:
            StorageError: a file is absent, may not be read, or ends before ``stop``; or the server
                sends whole files where ranges are asked for, twice in a row.
        """
        if self.is_local:
            contents: list[bytes] = []
            for name, group in groupby(ranges, key=itemgetter(0)):
                contents += self._read_local(name, [(start, stop) for _, start, stop in group])
            return contents
        wanted = WantedRanges(self._connection, self.size, ranges, concurrency)
        self._connection.run("", wanted.fetch)
        return wanted.contents()

    def publish(self, name: str, data: bytes) -> None:
        """Write a file whole: whoever reads it, even after a crash, finds the old one or the new.

        Raises:
            StorageError: it may not be written there.
        """
        if self.is_local:
            self._connection.run(
                name, lambda _: replace(self._connection.path(name), lambda file: file.write(data))
            )
        else:  # an object store shows an object only when it is complete
            self._connection.run(
                name, lambda fs: self._writable(fs).pipe_file(self._connection.path(name), data)
            )

    def publish_file(self, name: str, path: Path) -> None:
        """Copy a local file to ``name``, whole as :meth:`publish` does."""

        def copy(target: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

        if self.is_local:
            self._connection.run(name, lambda _: replace(self._connection.path(name), copy))
        else:
            target = self._connection.path(name)
            self._connection.run(name, lambda fs: self._writable(fs).put_file(str(path), target))

    def append(self, name: str, text: str | bytes) -> None:
        """Add to the end of a file, which is created if absent. A kill may cut short what is added.

        One process at a time: unless it is local, the file is read and published anew.
        """
        data = text.encode() if isinstance(text, str) else text
        if not self.is_local:
            old = self.read(name) if self.exists(name) else b""
            self.publish(name, old + data)
            return

        def add(_: object) -> None:
            path = self.local_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                before, left = file.tell(), memoryview(data)
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:  # a full disk takes a part of it
                    file.truncate(before)
                    raise

        self._connection.run(name, add)

    def free_bytes(self) -> int | None:
        """How much room is left; None where nobody can tell, as on object stores."""
        if not self.is_local:
            return None
        path = self.local_path("")
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        return shutil.disk_usage(existing).free

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        return self._info(name) is not None

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            StorageError: there is no such file, or the server does not tell.
        """
        info = self._info(name)
        if info is None or info["type"] != "file":
            raise StorageError(self._connection.shown(name), "no such file", mend="Check the URL")
        if info["size"] is None:
            raise StorageError(self._connection.shown(name), "the server does not tell its size")
        return int(info["size"])

    def list(self, name: str = "") -> list[str]:
        """Names of the files and folders directly in a folder, sorted; [] where there are none."""

        def names(file_system: Any) -> list[str]:
            with _nothing_if_absent():
                entries = file_system.ls(self._connection.path(name), detail=False)
                return [entry.rstrip("/") for entry in entries]
            return []

        # Some file systems list a folder, or a file that is none, as an entry of itself.
        folder = self._connection.path(name).rstrip("/")
        entries = [entry for entry in self._connection.run(name, names) if entry != folder]
        return sorted(filter(None, (self._name(entry.rsplit("/", 1)[-1]) for entry in entries)))

    def find(self, name: str = "") -> dict[str, int | None]:
        """All files in a folder and in the folders below it, by name; {} where there are none.

        Returns:
            Bytes of each file; None where the server does not tell.
        """

        def sizes(file_system: Any) -> dict[str, int | None]:
            with _nothing_if_absent():
                if self.is_local:  # fsspec would pass over a folder that may not be listed
                    return dict(walk(self._connection.path(name)))
                found = file_system.find(self._connection.path(name), detail=True)
                if isinstance(found, Mapping):  # adlfs answers otherwise where it is a file
                    return {path: info.get("size") for path, info in found.items()}
            return {}

        # Some file systems find a file that is asked for as a folder in itself.
        found = {
            self._name(path[len(self._connection.root) :].lstrip("/")): size
            for path, size in self._connection.run(name, sizes).items()
            if path.rstrip("/") != self._connection.path(name)
        }
        return {name: found[name] for name in sorted(found) if name}

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; do nothing where there is none."""

        def remove(file_system: Any) -> None:
            with _nothing_if_absent():
                self._writable(file_system).rm(self._connection.path(name), recursive=True)

        self._connection.run(name, remove)

    def _name(self, path: str) -> str:
        """The name of what a listing calls so; "" for what is not to be seen."""
        return "" if path.endswith(TEMPORARY) else self._connection.name(path)

    def _writable(self, file_system: Any) -> Any:
        if self._connection.is_http:
            raise NotImplementedError("HTTP is for reading")
        return file_system

    def _info(self, name: str) -> dict[str, Any] | None:
        # Not fsspec's `exists`, which takes every failure for absence.
        def info(file_system: Any) -> dict[str, Any] | None:
            with _nothing_if_absent():
                found: dict[str, Any] = file_system.info(self._connection.path(name))
                return found
            return None

        return self._connection.run(name, info)

    def _read_local(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        path = self._connection.path(name)
        try:
            contents = self._files.read(path, ranges)
        except OSError:
            contents = self._connection.run(name, lambda _: self._files.read(path, ranges))
        for (start, stop), content in zip(ranges, contents, strict=True):
            if len(content) != stop - start:
                raise cut_short(self._connection.shown(name), start, stop, content, self.size(name))
        return contents


@contextmanager
def _nothing_if_absent() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not failures.is_absent(error):
            raise


def absolute(url: str) -> str:
    """A local path made absolute, since workers may start in another folder; a URL as it is."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def at_file(url: str) -> tuple[Store, str]:
    """The folder that a file at an absolute path or URL is in, and its name there."""
    folder, _, name = url.rpartition("/")
    return Store(folder or "/"), name
