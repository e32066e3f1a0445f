"""Folders at any URL, with atomic publishing and retries with exponential back-off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from gatdist.common.errors import StorageError
from gatdist.config import REFERENCE, expand_env, redact_url
from gatdist.storage import batches, failures, local
from gatdist.storage.connection import Connection
from gatdist.storage.local import TEMPORARY, OpenFiles, create, remove_all, replace, walk
from gatdist.storage.urls import OutsideUrl


class Store:
    """A folder, which need not exist. Names are paths inside it; ``""`` is the folder itself.

    Thread-safe, and usable after a fork. ``${env:NAME}`` in ``url`` and ``options`` is replaced.
    Expired credentials are looked up again, once per operation. HTTP(S) is read-only and needs
    servers that support ranges; listings come from the links of the folder's page.

    Args:
        url: a path, or any URL that fsspec supports. The attribute has no secrets.
        options: of the fsspec file system; S3 takes ``key``, ``secret`` and
            ``client_kwargs = { endpoint_url = "…" }``, or the ``AWS_*`` variables.
        retry_budget_s: how long an operation is retried after its first failure.
        stall_s: time without data after which a connection of S3, GCS, Azure or HTTP is lost.
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
        return self._connection.is_local

    def local_path(self, name: str = "") -> Path:
        assert self.is_local, f"{self.url} is not local"
        return Path(self._connection.path(name))

    def child(self, name: str) -> Store:
        """Return a subfolder. Raises StorageError if the name leads out of this folder."""
        return self._anew(self._connection.child_url(name))

    @property
    def origin(self) -> str:
        return self._connection.origin

    def reach(self, url: OutsideUrl) -> Store:
        """Return the folder at ``url``. Raises ValueError on another origin or if unsafe."""
        url.require_plain()
        if url.origin != self.origin:
            raise ValueError(f"is on another origin than {self.origin}")
        return self._anew(url.on(self._connection.url))

    def with_retry_budget(self, retry_budget_s: float) -> Store:
        return partial(self._anew, retry_budget_s=retry_budget_s)(self._connection.url)

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises StorageError, as all methods below."""
        return self._connection.run(name, lambda fs: self._content(fs, name))

    def read_if_exists(self, name: str) -> bytes | None:
        content: bytes | None = self._run_if_exists(name, lambda fs: self._content(fs, name), None)
        return content

    def _content(self, file_system: Any, name: str) -> bytes:
        path = self._connection.path(name)
        content: bytes = local.read(path) if self.is_local else file_system.cat_file(path)
        return content

    def read_files(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Return the content of whole files of known sizes, with concurrent requests."""
        if self.is_local:
            return {name: self.read(name) for name in sizes}
        whole = self.read_ranges([(name, 0, size) for name, size in sizes.items()])
        return dict(zip(sizes, whole, strict=True))

    def read_ranges(
        self, ranges: Sequence[tuple[str, int, int]], *, concurrency: int = 16
    ) -> list[bytes]:
        """Return ranges (name, start, stop) of files, each complete, with concurrent requests."""
        if self.is_local:
            contents: list[bytes] = []
            for name, group in groupby(ranges, key=itemgetter(0)):
                contents += self._read_local(name, [(start, stop) for _, start, stop in group])
            return contents
        return batches.read_ranges(self._connection, self.size, ranges, concurrency)

    def publish(self, name: str, data: bytes) -> None:
        """Write a file atomically, also with regard to crashes. Raises StorageError."""
        # An object store shows an object only when it is complete.
        self._publish(
            name, lambda file: file.write(data), lambda fs, path: fs.pipe_file(path, data)
        )

    def create(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists, and return whether it now holds ``data``.

        One of several concurrent writers succeeds on S3, Google, Azure and local file systems. If
        an S3-compatible server refuses or ignores conditions, the last writer wins. ``data`` must
        be unique to this writer, to identify a request repeated after its answer was lost.
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
            # Outside the handler, so that errors here do not have that one as context.
            if self.read_if_exists(name) is None:
                file_system.pipe_file(path, data)

        self._upload(name, put)
        return self.read(name) == data

    def publish_file(self, name: str, path: Path) -> None:
        def copy(target: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

        self._publish(name, copy, lambda fs, target: fs.put_file(str(path), target))

    def append(self, name: str, text: str | bytes) -> None:
        """Append to a file, created if absent; one process at a time, and not atomic."""
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
                except OSError:  # a full disk stores only a part
                    file.truncate(before)
                    raise

        self._connection.run(name, add)

    def free_bytes(self) -> int | None:
        """Return the free space of a local file system; None if remote."""
        if not self.is_local:
            return None
        path = Path(os.path.realpath(self.local_path("")))
        existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
        return shutil.disk_usage(existing).free

    def exists(self, name: str = "") -> bool:
        return self._info(name) is not None

    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises StorageError if absent or unknown."""
        info = self._info(name)
        if info is None or info["type"] != "file":
            raise StorageError(self._connection.shown(name), "no such file", hint="Check the URL")
        if info["size"] is None:
            raise StorageError(self._connection.shown(name), "the server does not report its size")
        return int(info["size"])

    def list(self, name: str = "") -> list[str]:
        """Return the sorted names of files and folders directly in a folder; [] if absent."""
        found = self._run_if_exists(
            name, lambda fs: fs.ls(self._connection.path(name), detail=False), []
        )
        # Some file systems list a folder or file as an entry of itself, and adlfs lists folders
        # whose names only begin like this one's.
        entries = filter(self._is_in(name), (entry.rstrip("/") for entry in found))
        return sorted(filter(None, (self._name(entry.rsplit("/", 1)[-1]) for entry in entries)))

    def find(self, name: str = "", *, with_unfinished: bool = False) -> dict[str, int | None]:
        """Return the size of each file below a folder, by sorted name: None if unknown."""

        def sizes(file_system: Any) -> dict[str, int | None]:
            if self.is_local:  # fsspec would skip a folder without permission
                return dict(walk(self._connection.path(name)))
            found = file_system.find(self._connection.path(name), detail=True)
            # adlfs returns a list for a file.
            files = found.items() if isinstance(found, Mapping) else ()
            return {path: info.get("size") for path, info in files}

        # Some file systems find a file in itself.
        is_in = self._is_in(name)
        found = {
            self._name(path[len(self._connection.root) :].lstrip("/"), with_unfinished): size
            for path, size in self._run_if_exists(name, sizes, {}).items()
            if is_in(path)
        }
        return {name: found[name] for name in sorted(found) if name}

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its content, if it exists. Names are never patterns."""
        self._connection.run(name, self._writable)
        if self.is_local:
            self._connection.run(name, lambda _: remove_all(self._connection.path(name)))
        else:
            self.delete_files([*filter(None, [name]), *self.find(name)])

    def delete_files(self, names: Iterable[str]) -> None:
        """Delete files that exist, then empty folders. Names are never patterns."""
        self._connection.run("", self._writable)
        batches.delete_files(self._connection, list(names))

    def _is_in(self, name: str) -> Callable[[str], bool]:
        folder = self._connection.path(name).rstrip("/")
        if self._connection.is_http:  # listings are the links of the folder's page
            return lambda path: path.rstrip("/") != folder
        return lambda path: path.startswith(f"{folder}/") and path != f"{folder}/"

    def _name(self, path: str, with_unfinished: bool = False) -> str:
        hidden = path.endswith(TEMPORARY) and not with_unfinished
        return "" if hidden else self._connection.name(path)

    def _publish(
        self,
        name: str,
        write: Callable[[BinaryIO], object],
        put: Callable[[Any, str], object],
    ) -> None:
        if self.is_local:
            self._connection.run(name, lambda _: replace(self._connection.path(name), write))
        else:
            self._upload(name, put)

    def _upload(self, name: str, put: Callable[[Any, str], object]) -> None:

        def upload(file_system: Any) -> None:
            try:
                put(self._writable(file_system), self._connection.path(name))
            except Exception as error:
                if failures.answer(error).status == 410:  # Google dropped a resumable upload
                    raise failures.LostError(str(error)) from None
                raise

        self._connection.run(name, upload)

    def _writable(self, file_system: Any) -> Any:
        if self._connection.is_http:
            raise NotImplementedError("HTTP is for reading")
        return file_system

    def _info(self, name: str) -> dict[str, Any] | None:
        # fsspec's `exists` takes every failure for absence.
        return self._run_if_exists(name, lambda fs: fs.info(self._connection.path(name)), None)

    def _run_if_exists(self, name: str, operation: Callable[[Any], Any], absent: Any) -> Any:
        def run(file_system: Any) -> Any:
            try:
                return operation(file_system)
            except Exception as error:
                if not failures.is_absent(error):
                    raise
                return absent

        return self._connection.run(name, run)

    def _read_local(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        path = self._connection.path(name)
        try:
            contents = self._files.read(path, ranges)
        except OSError:
            contents = self._connection.run(name, lambda _: self._files.read(path, ranges))
        for (start, stop), content in zip(ranges, contents, strict=True):
            if len(content) != stop - start:
                raise batches.truncated(
                    self._connection.shown(name), start, stop, content, self.size(name)
                )
        return contents


def at_file(url: str) -> tuple[Store, str]:
    """Return folder and name of a file at an absolute path or URL. Raises StorageError."""
    if REFERENCE.fullmatch(url):  # it has no folder until it is replaced
        url = expand_env(url)
    protocol, mark, path = url.partition("://")
    if not mark:
        folder, _, name = url.rpartition("/")
        return Store(folder or "/"), name
    query = ""
    if protocol in ("http", "https"):  # a signature may hold a slash
        path, sign, query = path.partition("?")
        query = sign + query
    folder, slash, name = path.rpartition("/")
    if not slash:
        rule = "must name a file in a folder or bucket"
        raise StorageError(redact_url(url), rule, hint="Add a name: PROTOCOL://FOLDER/FILE")
    return Store(f"{protocol}://{folder or '/'}"), name + query
