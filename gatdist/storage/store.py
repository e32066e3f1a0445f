"""A folder at any URL: local paths, ``memory://``, ``s3://`` and what else fsspec knows.

Two promises hold on every kind of storage: what is published is seen whole or not at all, and an
operation that fails for a passing reason is tried again, with jittered exponential back-off, until
its time is used up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from gatdist.common.errors import StorageError
from gatdist.config import redact_url
from gatdist.storage import failures, local
from gatdist.storage.connection import Connection
from gatdist.storage.deletion import Deletion
from gatdist.storage.local import TEMPORARY, OpenFiles, create, remove_all, replace, walk
from gatdist.storage.origin import OutsideUrl
from gatdist.storage.ranges import RequestedRanges, cut_short


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
        url: str,  # the user's own; see `reach` for others
        options: Mapping[str, Any] | None = None,
        *,
        retry_budget_s: float = 60.0,
        stall_s: float = 30.0,
    ) -> None:
        assert isinstance(url, str), "a URL that others wrote is opened by `reach`"
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
        """The folder ``name`` in this one.

        Raises:
            StorageError: the name leads out of this folder, or holds a reference.
        """
        return self._anew(self._connection.child_url(name))

    @property
    def origin(self) -> str:
        """Where its credentials may go; see :mod:`gatdist.storage.origin`."""
        return self._connection.origin

    def reach(self, url: OutsideUrl) -> Store:
        """The folder at a URL that others wrote, with the options of this store.

        Raises:
            ValueError: it is on another origin, or no plain URL; the message is the rule.
        """
        url.require_plain()
        if url.origin != self.origin:
            raise ValueError(f"is on another origin than {self.origin}")
        return self._anew(url.on(self._connection.url))

    def with_retry_budget(self, retry_budget_s: float) -> Store:
        """The same folder, with another limit on how long an operation is retried."""
        return partial(self._anew, retry_budget_s=retry_budget_s)(self._connection.url)

    def read(self, name: str) -> bytes:
        """The whole content of a file.

        Raises:
            StorageError: it does not exist or may not be read.
            StorageUnavailableError: storage kept failing. So do all methods below.
        """
        return self._connection.run(name, lambda fs: self._content(fs, name))

    def read_if_exists(self, name: str) -> bytes | None:
        """The whole content of a file; None where there is none."""

        def content(file_system: Any) -> bytes | None:
            with _nothing_if_absent():
                return self._content(file_system, name)
            return None

        return self._connection.run(name, content)

    def _content(self, file_system: Any, name: str) -> bytes:
        path = self._connection.path(name)
        content: bytes = local.read(path) if self.is_local else file_system.cat_file(path)
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
        requested = RequestedRanges(self._connection, self.size, ranges, concurrency)
        self._connection.run("", requested.fetch)
        return requested.contents()

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
            self._upload(name, lambda fs, path: fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one: of several that try at once, one succeeds.

        S3, Google, Azure and this machine decide that themselves, as do fsspec's other file systems
        as far as they can. Where a copy of S3 refuses conditions or ignores them, the last writer
        wins, and of writers at the same instant more than one may believe that it has created the
        file: whoever reads it later sees whose it is.

        Args:
            name: of the file.
            data: what no other writer writes: hold a random number in it. By this, a request that
                was made again after its answer was lost is known to have succeeded.

        Returns:
            Whether the file holds ``data`` now.
        """

        def put(file_system: Any, path: str) -> None:
            try:
                if self.is_local:
                    create(path, data)
                else:
                    file_system.pipe_file(path, data, mode="create")
                return
            except Exception as error:
                if failures.is_taken(error):
                    return
                if not failures.is_unsupported(error):
                    raise
            # Out of the handler: what fails here must not seem to come of what failed there.
            if self.read_if_exists(name) is None:
                file_system.pipe_file(path, data)

        self._upload(name, put)
        return self.read(name) == data

    def publish_file(self, name: str, path: Path) -> None:
        """Copy a local file to ``name``, whole as :meth:`publish` does."""

        def copy(target: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

        if self.is_local:
            self._connection.run(name, lambda _: replace(self._connection.path(name), copy))
        else:
            self._upload(name, lambda fs, target: fs.put_file(str(path), target))

    def append(self, name: str, text: str | bytes) -> None:
        """Add to the end of a file, which is created if absent. A kill may cut short what is added.

        One process at a time: unless it is local, the file is read and published anew.
        """
        data = text.encode() if isinstance(text, str) else text
        if not self.is_local:
            self.publish(name, (self.read_if_exists(name) or b"") + data)
            return

        def add(_: object) -> None:
            path = self.local_path(name)
            os.makedirs(os.path.realpath(path.parent), exist_ok=True)
            if path.exists():
                local.require_regular(path.stat())
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
        path = Path(os.path.realpath(self.local_path("")))
        existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
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
            raise StorageError(self._connection.shown(name), "no such file", hint="Check the URL")
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

        # Some file systems list a folder, or a file that is none, as an entry of itself, and adlfs
        # lists what is in folders whose names only begin like this one's.
        entries = filter(self._is_in(name), self._connection.run(name, names))
        return sorted(filter(None, (self._name(entry.rsplit("/", 1)[-1]) for entry in entries)))

    def find(self, name: str = "", *, with_unfinished: bool = False) -> dict[str, int | None]:
        """All files in a folder and in the folders below it, by name; {} where there are none.

        Args:
            name: of the folder.
            with_unfinished: whether those are among them that killed processes have left; see
                :func:`~gatdist.storage.unfinished`.

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
        is_in = self._is_in(name)
        found = {
            self._name(path[len(self._connection.root) :].lstrip("/"), with_unfinished): size
            for path, size in self._connection.run(name, sizes).items()
            if is_in(path)
        }
        return {name: found[name] for name in sorted(found) if name}

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; do nothing where there is none.

        Names are exact, never patterns. What is in a folder is listed once.
        """
        self._connection.run(name, self._writable)
        if self.is_local:
            self._connection.run(name, lambda _: remove_all(self._connection.path(name)))
        else:
            self.delete_files([*filter(None, [name]), *self.find(name)])

    def delete_files(self, names: Iterable[str]) -> None:
        """Remove these files, and folders that hold nothing then; absent ones are passed over.

        Names are exact, never patterns. Nothing is listed.
        """
        deletion = Deletion(self._connection, list(names))
        self._connection.run("", lambda fs: deletion.attempt(self._writable(fs)))

    def _is_in(self, name: str) -> Callable[[str], bool]:
        """Whether a path is one of something in a folder."""
        folder = self._connection.path(name).rstrip("/")
        if self._connection.is_http:  # what is listed are links of the folder's page
            return lambda path: path.rstrip("/") != folder
        return lambda path: path.startswith(f"{folder}/") and path != f"{folder}/"

    def _name(self, path: str, with_unfinished: bool = False) -> str:
        """The name of what a listing calls so; "" for what is not to be seen."""
        hidden = path.endswith(TEMPORARY) and not with_unfinished
        return "" if hidden else self._connection.name(path)

    def _upload(self, name: str, put: Callable[[Any, str], object]) -> None:
        """``put(file_system, path)``, and again on a transient failure."""

        def upload(file_system: Any) -> None:
            try:
                put(self._writable(file_system), self._connection.path(name))
            except Exception as error:
                if failures.answer(error).status == 410:  # Google has forgotten a resumable upload
                    raise failures.LostError(str(error)) from None
                raise

        self._connection.run(name, upload)

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


def at_file(url: str) -> tuple[Store, str]:
    """The folder that a file at an absolute path or URL is in, and its name there.

    Raises:
        StorageError: the URL has a host or bucket only.
    """
    protocol, mark, path = url.partition("://")
    if not mark:
        folder, _, name = url.rpartition("/")
        return Store(folder or "/"), name
    folder, slash, name = path.rpartition("/")
    if not slash:
        rule = "names no file in a folder or bucket"
        raise StorageError(redact_url(url), rule, hint="Add a name: PROTOCOL://FOLDER/FILE")
    return Store(f"{protocol}://{folder or '/'}"), name
