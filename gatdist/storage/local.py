"""This machine's file systems: files kept open, folders walked, files replaced whole."""

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
    """Of a file that a killed process left, the one that it was writing; "" for any other."""
    folder, slash, name = name.rpartition("/")
    match = _UNFINISHED.fullmatch(name)
    return f"{folder}{slash}{match[1]}" if match else ""


class OpenFiles:
    """Reads ranges of files, which stay open: opening one takes longer than reading a sample of it.

    A file that was replaced or changed since it was opened is opened anew. Safe to use from several
    threads. Files are closed when this object is dropped.

    Args:
        most: how many files stay open; those not read for longest are closed first.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._process, self._lock = os.getpid(), threading.Lock()

    def read(self, path: str, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) of a file, fewer where it ends before.

        Raises:
            OSError: it can't be opened or read.
        """
        file = self._open(path)
        return [_read(file.descriptor, start, stop) for start, stop in ranges]

    def _open(self, path: str) -> _OpenFile:
        version = _version(os.stat(path))
        if self._process != os.getpid():  # forked, perhaps while another thread had the lock
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
    """Open until nobody holds it: a thread may be reading while another drops it from the files."""

    def __init__(self, path: str) -> None:
        self.descriptor = _opened(path)
        self.version = _version(os.fstat(self.descriptor))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


def require_regular(facts: os.stat_result) -> None:
    """Raise OSError for what is no file: a folder, pipe, socket or device."""
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "is no regular file")


def read(path: str) -> bytes:
    """The whole content of a file. Raises OSError."""
    with os.fdopen(_opened(path), "rb") as file:
        return file.read()


def _opened(path: str) -> int:
    """A descriptor of a regular file. Raises OSError."""
    # Opening a pipe would wait for whoever writes to it; a device may have no end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _version(facts: os.stat_result) -> tuple[int, ...]:
    """Equal as long as a file is the same and nobody writes to it."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _read(descriptor: int, start: int, stop: int) -> bytes:
    content = os.pread(descriptor, stop - start, start)
    while len(content) < stop - start:  # Linux reads at most 2 GiB at a time
        more = os.pread(descriptor, stop - start - len(content), start + len(content))
        if not more:
            break
        content += more
    return content


def walk(folder: str) -> Iterator[tuple[str, int]]:
    """Path and size of each file below a folder; links are followed, but not in circles."""
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
                if is_dangling(entry):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():  # no socket
                    yield entry.path, entry.stat().st_size


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Whether a folder's entry is a link to nothing, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def dangling_links(folder: str) -> Iterator[str]:
    """Paths of the links below a folder that lead to nothing; links to folders aren't followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_dangling(entry):
                yield entry.path
            elif entry.is_dir(follow_symlinks=False):
                yield from dangling_links(entry.path)


def replace(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write aside, flush to the disk, and rename over ``path``, or over what a link there leads to.

    Raises:
        OSError: there is something else than a file, such as a device.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "is no regular file")
    _write(path, write, os.replace)


def create(path: str, data: bytes) -> None:
    """Write aside, flush to the disk, and link to ``path``.

    Where a file system has no hard links, the file is created in place; it may be seen unfinished.

    Raises:
        FileExistsError: there is a file already.
    """

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
    """Delete a file below ``root``. Where a folder on the way is a link, nothing is deleted."""
    folders = name.split("/")[:-1]
    if not any(os.path.islink("/".join([root, *folders[: i + 1]])) for i in range(len(folders))):
        os.unlink(f"{root}/{name}")


def remove_all(path: str) -> None:
    """Delete a file, or a folder with all that is in it. Links are deleted, not followed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)


def _write(
    path: str, write: Callable[[BinaryIO], object], put: Callable[[str, str], object]
) -> None:
    """Write aside, flush to the disk, and ``put`` what was written at ``path``."""
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
    with suppress(OSError):  # not every file system can
        handle = os.open(folder or "/", os.O_RDONLY)
        try:
            os.fsync(handle)  # the new name, too, shall survive a power cut
        finally:
            os.close(handle)
