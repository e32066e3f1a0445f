"""A folder at any URL: local paths, ``memory://``, ``s3://`` and what else fsspec knows.

Two promises hold on every kind of storage: what is published is seen whole or not at all, and an
operation that fails for a passing reason is tried again, with jittered exponential back-off, until
its time is used up.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gatdist.config import expand_env
from gatdist.errors import StorageError, StorageUnavailableError

T = TypeVar("T")

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 10.0
# fsspec would ask for over a thousand ranges at once, more than servers and open-file limits bear.
_CONCURRENT_RANGES = 16
# Trying again can't help against these. A full disk is not among them: it may be about to be freed.
_PERMANENT = {
    *(errno.EACCES, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP),
    *(errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS, errno.ENOTDIR),
    *(errno.ENOTEMPTY, errno.EPERM, errno.EROFS),
}
_ABSENT = (FileNotFoundError, NotADirectoryError)
_TEMPORARY = ".publishing"


class Store:
    """A folder, which need not exist yet.

    Names are paths inside it, with ``/``; ``""`` is the folder itself. Safe to use from several
    threads. ``${env:NAME}`` in ``url`` and ``options`` is replaced at once, and never shown.

    Args:
        url: a path, or any URL that fsspec knows.
        options: passed to the fsspec file system; S3 takes ``key``, ``secret`` and
            ``client_kwargs = { endpoint_url = "…" }``, or the usual ``AWS_*`` variables.
        retry_budget_s: for how long one operation is tried again.

    Raises:
        StorageError: the protocol is not known or its package not installed, or an option is wrong.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, retry_budget_s: float = 60.0
    ) -> None:
        self.url = url
        self._options = dict(options or {})
        self._retry_budget_s = retry_budget_s
        try:
            # Listings are never cached: another process may have written since.
            self._fs, root = fsspec.core.url_to_fs(
                expand_env(url), use_listings_cache=False, **_expanded(self._options)
            )
        except (ImportError, TypeError, ValueError) as error:
            raise StorageError(
                url, f"can't be opened ({error})", mend="Check the protocol and storage_options"
            ) from error
        self._root = root.rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return isinstance(self._fs, LocalFileSystem)

    def local_path(self, name: str = "") -> Path:
        """Where ``name`` is on this machine's file system; only for a local store."""
        assert self.is_local, f"{self.url} is not local"
        return Path(self._path(name))

    def child(self, name: str) -> Store:
        """The folder ``name`` in this one."""
        return Store(self._shown(name), self._options, retry_budget_s=self._retry_budget_s)

    def read(self, name: str) -> bytes:
        """The whole content of a file.

        Raises:
            StorageError: it does not exist or may not be read.
            StorageUnavailableError: storage kept failing. So do all methods below.
        """
        content: bytes = self._retrying(name, lambda: self._fs.cat_file(self._path(name)))
        return content

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes ``start`` (inclusive) to ``stop`` (exclusive) of files, many at a time.

        Args:
            ranges: (name, start, stop), with 0 ≤ start ≤ stop.

        Returns:
            Each range, in the order asked, of exactly the length asked.

        Raises:
            StorageError: a file is absent, may not be read, or ends before ``stop``.
        """
        if not ranges:
            return []
        names, starts, stops = (list(column) for column in zip(*ranges, strict=True))
        # Failures come back as data here; each one is then tried again by itself.
        limit = {"batch_size": _CONCURRENT_RANGES} if self._fs.async_impl else {}
        found = self._retrying(
            names[0],
            lambda: self._fs.cat_ranges(
                [self._path(n) for n in names], starts, stops, on_error="return", **limit
            ),
        )
        return [
            content
            if isinstance(content, bytes) and len(content) == stop - start
            else self._read_range(name, start, stop)
            for (name, start, stop), content in zip(ranges, found, strict=True)
        ]

    def publish(self, name: str, data: bytes) -> None:
        """Write a file whole: whoever reads it, even after a crash, finds the old one or the new.

        Raises:
            StorageError: it may not be written there.
        """
        if self.is_local:
            self._retrying(name, lambda: _replace(self._path(name), lambda file: file.write(data)))
        else:  # an object store shows an object only when it is complete
            self._retrying(name, lambda: self._fs.pipe_file(self._path(name), data))

    def publish_file(self, name: str, path: Path) -> None:
        """Copy a local file to ``name``, whole as :meth:`publish` does."""

        def copy(target: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

        if self.is_local:
            self._retrying(name, lambda: _replace(self._path(name), copy))
        else:
            self._retrying(name, lambda: self._fs.put_file(str(path), self._path(name)))

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file, which is created if absent. A kill may cut the text short.

        One process at a time: unless it is local, the file is read and published anew.
        """
        if not self.is_local:
            old = self.read(name) if self.exists(name) else b""
            self.publish(name, old + text.encode())
            return

        def add() -> None:
            path = self.local_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(text.encode())

        self._retrying(name, add)

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        return self._info(name) is not None

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            StorageError: there is no such file.
        """
        info = self._info(name)
        if info is None or info["type"] != "file":
            raise StorageError(self._shown(name), "no such file", mend="Check the URL")
        return int(info["size"])

    def list(self, name: str = "") -> list[str]:
        """Names of the files and folders directly in a folder, sorted; [] where there are none."""

        def names() -> list[str]:
            with suppress(*_ABSENT):
                entries = [
                    entry.rstrip("/") for entry in self._fs.ls(self._path(name), detail=False)
                ]
                # Some file systems list a folder, or a file that is none, as an entry of itself.
                folder = self._path(name).rstrip("/")
                return sorted(entry.rsplit("/", 1)[-1] for entry in entries if entry != folder)
            return []

        return [entry for entry in self._retrying(name, names) if not entry.endswith(_TEMPORARY)]

    def find(self, name: str = "") -> dict[str, int | None]:
        """All files in a folder and in the folders below it, by name; {} where there are none.

        Returns:
            Bytes of each file; None where the server does not tell.
        """

        def sizes() -> dict[str, int | None]:
            with suppress(*_ABSENT):
                if self.is_local:  # fsspec would pass over a folder that may not be listed
                    return dict(_walk(self._path(name)))
                found = self._fs.find(self._path(name), detail=True)
                return {path: info.get("size") for path, info in found.items()}
            return {}

        # Some file systems find a file that is asked for as a folder in itself.
        return {
            path[len(self._root) :].lstrip("/"): size
            for path, size in sorted(self._retrying(name, sizes).items())
            if not path.endswith(_TEMPORARY) and path.rstrip("/") != self._path(name)
        }

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; do nothing where there is none."""

        def remove() -> None:
            with suppress(*_ABSENT):
                self._fs.rm(self._path(name), recursive=True)

        self._retrying(name, remove)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root or "/"

    def _shown(self, name: str) -> str:
        # Of a URL such as memory:// no slash may be taken away.
        slash = "" if self.url.endswith("/") else "/"
        return f"{self.url}{slash}{name}" if name else self.url

    def _info(self, name: str) -> dict[str, Any] | None:
        # Not fsspec's `exists`, which takes every failure for absence.
        def info() -> dict[str, Any] | None:
            with suppress(*_ABSENT):
                found: dict[str, Any] = self._fs.info(self._path(name))
                return found
            return None

        return self._retrying(name, info)

    def _read_range(self, name: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""

        def fetch() -> bytes:
            content: bytes = self._fs.cat_file(self._path(name), start=start, end=stop)
            if len(content) == stop - start:
                return content
            size = self.size(name)
            if size < stop or len(content) > stop - start:
                raise StorageError(
                    self._shown(name),
                    f"gave {len(content)} bytes for the range {start} to {stop} (of {size})",
                    mend="The file is cut short, or the server ignores ranges",
                )
            raise ConnectionError(f"{len(content)} of {stop - start} bytes arrived")

        return self._retrying(name, fetch)

    def _retrying(self, name: str, operation: Callable[[], T]) -> T:
        """Do it; on a passing failure again, until the budget is used up.

        Raises:
            StorageError: another failure of storage. Failures that are none are raised as they are.
            StorageUnavailableError: the budget is used up.
        """
        began, delay_s, attempts = time.monotonic(), _FIRST_DELAY_S, 0
        while True:
            attempts += 1
            try:
                return operation()
            except (StorageError, StorageUnavailableError):
                raise
            except Exception as error:
                if not _is_transient(error):
                    rule, mend = self._diagnosis(error)
                    if not rule:
                        raise
                    rule = f"{rule} ({self._told(error)})"
                    raise StorageError(self._shown(name), rule, mend=mend) from error
                # Jitter keeps many workers from coming back at the same moment.
                pause_s = delay_s * (0.5 + random.random())
                elapsed_s = time.monotonic() - began
                if elapsed_s + pause_s > self._retry_budget_s:
                    raise StorageUnavailableError(
                        f"{self._shown(name)}: storage kept failing, {attempts} attempts in "
                        f"{elapsed_s:.0f} s ({self._told(error)}). Check that it is up and has "
                        "room, then run the same command again."
                    ) from error
                time.sleep(pause_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _diagnosis(self, error: Exception) -> tuple[str, str]:
        """What a lasting failure of storage means, and the mend; "" where it is no such failure."""
        if isinstance(error, _ABSENT):
            mend = (
                "Check the path"
                if self.is_local
                else "Check the URL; the bucket must exist already"
            )
            return "does not exist", mend
        if isinstance(error, PermissionError) or _status(error) in (401, 403):
            mend = (
                "Check its permissions"
                if self.is_local
                else "Check the credentials and their rights"
            )
            return "not permitted", mend
        if isinstance(error, NotImplementedError):
            return "can't be written", "Choose another kind of storage"
        if {"BotoCoreError", "ClientError"} & _class_names(error):
            mend = (
                "Check the URL, the credentials (AWS_ACCESS_KEY_ID and so on) and storage_options"
            )
            return "can't be used", mend
        if isinstance(error, OSError):
            return "can't be used", "Check the URL"
        return "", ""

    def _told(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.strerror and error.filename:
            return error.strerror  # the path is told already
        message = " ".join(str(error).split()) or type(error).__name__  # in one line
        # The resolved URL may hold a secret, for which the given one has ${env:NAME}.
        return message.replace(self._root, self.url) if "${env:" in self.url else message


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    """Path and size of each file below a local folder; links are followed, but not in circles."""
    seen = set()
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():  # no socket, and no link to what is gone
                    yield entry.path, entry.stat().st_size


def _replace(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write aside, flush to the disk, and rename over ``path``."""
    folder, _, name = path.rpartition("/")
    os.makedirs(folder or "/", exist_ok=True)
    aside = f"{folder}/.{name}.{secrets.token_hex(8)}{_TEMPORARY}"
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise
    with suppress(OSError):  # not every file system can
        handle = os.open(folder or "/", os.O_RDONLY)
        try:
            os.fsync(handle)  # the new name, too, shall survive a power cut
        finally:
            os.close(handle)


def _expanded(value: Any) -> Any:
    """``value`` with each ``${env:NAME}`` in its strings replaced."""
    if isinstance(value, str):
        return expand_env(value)
    if isinstance(value, Mapping):
        return {key: _expanded(item) for key, item in value.items()}
    return [_expanded(item) for item in value] if isinstance(value, list) else value


def _is_transient(error: Exception) -> bool:
    if status := _status(error):
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError):  # time-outs and lost connections among them
        return error.errno not in _PERMANENT and not isinstance(error, (*_ABSENT, PermissionError))
    # Lost connections as botocore and aiohttp name them. Neither package need be installed.
    lost = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError"}
    return bool(lost & _class_names(error))


def _status(error: Exception) -> int:
    """The HTTP status that aiohttp's errors carry; 0 for other errors."""
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _class_names(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
