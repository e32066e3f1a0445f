"""Local files: kept open for reading, replaced atomically, walked and deleted."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO

TEMPORARY = ".publishing"
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_UNFINISHED = re.compile(rf"\.(.+)\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}", re.DOTALL)


def unfinished(name: str) -> str:
    """Return the file that a killed process was writing to ``name``; "" if it is no such file."""
    folder, slash, name = name.rpartition("/")
    match = _UNFINISHED.fullmatch(name)
    return f"{folder}{slash}{match[1]}" if match else ""


class OpenFiles:
    """Cache of ``most`` open files, opened again if replaced or changed. Thread-safe."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._process, self._lock = os.getpid(), threading.Lock()

    def read(self, path: str, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Return bytes ``start`` to ``stop`` (exclusive), fewer at the end. Raises OSError."""
        file = self._open(path)
        return [_read(file.descriptor, start, stop) for start, stop in ranges]

    def _open(self, path: str) -> _OpenFile:
        version = _version(os.stat(path))
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._process, self._lock = os.getpid(), threading.Lock()
        with self._lock:
            file = self._files.get(path)
            if file and file.version == version:
                self._files.move_to_end(path)
                return file
        file = _OpenFile(path)
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            if len(self._files) > self._most:
                self._files.popitem(last=False)
        return file


class _OpenFile:
    """Closed when no longer referenced: a thread may read while another evicts it."""

    def __init__(self, path: str) -> None:
        self.descriptor = _opened(path)
        self.version = _version(os.fstat(self.descriptor))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


def require_regular(status: os.stat_result) -> None:
    """Raise OSError for a folder, pipe, socket or device."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file")


def read(path: str) -> bytes:
    """Return the content of a file. Raises OSError."""
    with os.fdopen(_opened(path), "rb") as file:
        return file.read()


def _opened(path: str) -> int:
    # Opening a pipe would wait for its writer; a device may have no end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(descriptor: int, start: int, stop: int) -> bytes:
    content = os.pread(descriptor, stop - start, start)
    while len(content) < stop - start:  # Linux reads at most 2 GiB at a time
        more = os.pread(descriptor, stop - start - len(content), start + len(content))
        if not more:
            break
        content += more
    return content


def walk(folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of each file below a folder; links are followed, but not in cycles."""
    seen = set()
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_dangling(entry):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():  # not a socket
                    yield entry.path, entry.stat().st_size


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Return whether a folder's entry is a broken link."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def links(folder: str) -> Iterator[str]:
    """Yield paths of symbolic links below a folder, which are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir():
                yield from links(entry.path)


def replace(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically, or the target of a link. Raises OSError if it is no file."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "is not a regular file")
    _write(path, write, os.replace)


def create(path: str, data: bytes) -> None:
    """Create a file atomically if the file system has hard links. Raises FileExistsError."""

    def link(aside: str, path: str) -> None:
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "xb") as file:
                file.write(data)
        os.unlink(aside)

    folder, _, name = path.rpartition("/")
    _write(f"{os.path.realpath(folder or '/')}/{name}", lambda file: file.write(data), link)


def remove(root: str, name: str) -> None:
    """Delete a file below ``root``, unless a folder on the way is a link."""
    folders = name.split("/")[:-1]
    if not any(os.path.islink("/".join([root, *folders[: i + 1]])) for i in range(len(folders))):
        os.unlink(f"{root}/{name}")


def remove_all(path: str) -> None:
    """Delete a file or a folder with its content. Links are deleted, not followed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)


def _write(
    path: str, write: Callable[[BinaryIO], object], put: Callable[[str, str], object]
) -> None:
    folder, _, name = path.rpartition("/")
    os.makedirs(folder or "/", exist_ok=True)
    aside = f"{folder}/.{name}.{secrets.token_hex(8)}{TEMPORARY}"
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise
    with suppress(OSError):  # not supported everywhere
        handle = os.open(folder or "/", os.O_RDONLY)
        try:
            os.fsync(handle)  # the new name must survive a power cut, too
        finally:
            os.close(handle)
