"""Cache of fetched blocks on a local disk, shared by the workers of a host and by several runs.

::

    <folder>/gatdist-blocks-1/
        lock             empty; the process that fetches block number k locks byte k
        usage            upper bound on the bytes of all blocks, in decimal
        0123abcd….block  one block: magic, CRC-32 and length of its content, then the content
        ….part           a block being written, locked by its writer

A block's name is a digest of its shard's digest and its byte range, so that data sets and their
versions do not collide. The kernel releases the locks of a killed process. If the folder belongs to
another user, one with the user's id in its name is used.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from isal.isal_zlib import crc32

from gatdist.common.errors import StorageError

_FOLDER = "gatdist-blocks-1"
_HEADER = struct.Struct("<8sIQ")  # magic, CRC-32, length
_MAGIC = b"gatdist1"
# struct flock of Linux: type, whence, start, length, process (0 for locks of an open file).
_FLOCK = struct.Struct("hhqqi4x")
_USAGE_LOCK, _SWEEP_LOCK = 2**62, 2**62 + 1  # above the number of any block
# Others may write to the parent folder: do not follow links or wait for pipes.
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OURS = re.compile(r"[0-9a-f]{40}\.block(?:-[0-9a-f]{16}\.part)?", re.ASCII)
# A full cache is emptied to this share at once, since finding the oldest blocks takes a listing.
_KEPT_SHARE = 0.9
_POLL_S = 0.005
# A process that fetches a block may hang: others then fetch it, too.
_PATIENCE_S = 20.0
_USAGE_PATIENCE_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

Load = Callable[[list[int]], list[bytes]]


def block_key(shard_digest: str, start: int, stop: int) -> str:
    """Return the key of bytes ``start`` to ``stop`` of the shard with that SHA-256 (hex)."""
    return hashlib.sha256(f"{shard_digest} {start} {stop}".encode()).hexdigest()[:40]


class HostCache:
    """Blocks by key. Safe to use from several threads and processes.

    After construction it never fails: if writing fails, it stops caching and adds to ``notes``.
    Only a subfolder of ``folder`` is touched. Among runs that share it, the lowest ``max_bytes``
    applies.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._parent = os.path.abspath(folder)
        self._uid = os.geteuid()
        self._max_bytes = max_bytes
        self._writes = True
        self.notes: list[str] = []  # warnings to show once
        self.hits = 0  # blocks found in the cache
        try:
            with suppress(FileExistsError):
                os.makedirs(self._parent)
            os.close(os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            if os.statvfs(self._parent).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            with suppress(FileNotFoundError), self._opened():  # removed, or replaced by a link
                pass
        except OSError as error:
            if error.errno not in (*_FULL, errno.EPERM):
                raise StorageError(
                    "data.cache_dir",
                    f"can't be used ({error.strerror or error})",
                    value=folder,
                    hint="Choose a writable folder on a local disk, or remove the key",
                ) from error
            self._stop_writing(error)
            return
        # Listing a large folder is slow.
        threading.Thread(target=self._tidy, name="gatdist-cache-sweep", daemon=True).start()

    def fetch(
        self, keys: Sequence[str], load: Load, stopped: Callable[[], bool] = lambda: False
    ) -> list[bytes]:
        """Return the content of blocks. An absent block is loaded by one process, and kept.

        ``load`` returns the content of ``keys[i]`` for each given i; each key is given once. While
        waiting for another process, return [] if ``stopped``.
        """
        found = {i: data for i, key in enumerate(keys) if (data := self._read(key)) is not None}
        self.hits += len(found)
        patience_ends = time.monotonic() + _PATIENCE_S
        while missing := [i for i in range(len(keys)) if i not in found]:
            if stopped():
                return []
            if self._writes and time.monotonic() < patience_ends:
                found |= self._load_unless_others_do(keys, missing, load)
                if len(found) < len(keys):
                    time.sleep(_POLL_S)
            else:
                found |= zip(missing, load(missing), strict=True)
        return [found[i] for i in range(len(keys))]

    def forget(self, key: str) -> None:
        with suppress(OSError), self._opened() as folder:
            os.unlink(f"{key}.block", dir_fd=folder)

    def _load_unless_others_do(
        self, keys: Sequence[str], missing: list[int], load: Load
    ) -> dict[int, bytes]:
        try:
            with self._opened() as folder:
                lock = _open_lock(folder)
        except OSError as error:
            self._stop_writing(error)
            return {}
        try:
            # Never wait while holding a lock: no deadlock.
            mine = [i for i in missing if _lock(lock, _number(keys[i]))]
            found = {i: data for i in mine if (data := self._read(keys[i])) is not None}
            self.hits += len(found)
            absent = [i for i in mine if i not in found]
            if absent:
                for i, data in zip(absent, load(absent), strict=True):
                    found[i] = data
                    self._write(keys[i], data)
            return found
        finally:
            os.close(lock)

    def _read(self, key: str) -> bytes | None:
        try:
            with self._opened() as folder:
                file = os.open(f"{key}.block", os.O_RDONLY | _OPEN, dir_fd=folder)
        except OSError:
            return None
        try:
            status = os.fstat(file)
            if not self._is_ours(status):
                return None
            magic, crc, length = _HEADER.unpack(os.read(file, _HEADER.size))
            if magic == _MAGIC and status.st_size == _HEADER.size + length:
                content = os.pread(file, length, _HEADER.size)
                if len(content) == length and crc32(content) == crc:
                    with suppress(OSError):
                        os.utime(file)  # marks it as used
                    return content
        except (OSError, struct.error):
            pass  # truncated by a power cut, or the disk fails
        finally:
            os.close(file)
        self.forget(key)
        return None

    def _write(self, key: str, content: bytes) -> None:
        size = _HEADER.size + len(content)
        if not self._writes or size > self._max_bytes:
            return
        part = f"{key}.block-{secrets.token_hex(8)}.part"
        try:
            with self._opened() as folder:
                file = self._begin(folder, part, size)
                if file is None and self._sweep(folder, size):
                    file = self._begin(folder, part, size)
                if file is not None:
                    _finish(folder, file, part, f"{key}.block", content)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the folder was removed; it is created again
                self._stop_writing(error)

    def _begin(self, folder: int, part: str, size: int) -> int | None:
        """Create and lock a file of ``size`` bytes; None if there is no room for it."""
        with _usage_locked(folder):
            usage = _usage(folder)
            if usage is None or usage + size > self._max_bytes:
                return None
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN
            file = os.open(part, flags, 0o600, dir_fd=folder)
            try:
                # A later listing includes all that is counted, with its whole size.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, size)
                _set_usage(folder, usage + size)
            except BaseException:
                os.close(file)
                with suppress(OSError):
                    os.unlink(part, dir_fd=folder)
                raise
            return file

    def _tidy(self) -> None:
        with suppress(OSError), self._opened() as folder:
            self._sweep(folder, 0)

    def _sweep(self, folder: int, size: int) -> bool:
        """Remove files of dead processes and, if full, the least recently used blocks.

        Return False if another process of the host does so.
        """
        lock = _open_lock(folder)
        try:
            if not _lock(lock, _SWEEP_LOCK):
                return False
            with _usage_locked(folder):
                before = _usage(folder)
            blocks, total = [], 0
            for used_ns, num_bytes, name in self._files(folder):
                if name.endswith(".part") and _remove_if_dead(folder, name):
                    continue
                total += num_bytes
                if name.endswith(".block"):
                    blocks.append((used_ns, num_bytes, name))
            kept = total
            if total + size > self._max_bytes:
                target = max(0, int(self._max_bytes * _KEPT_SHARE) - size)
                for _, num_bytes, name in sorted(blocks):
                    if kept <= target:
                        break
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
                    kept -= num_bytes
            with _usage_locked(folder):
                now = _usage(folder)
                # The listing may or may not include what others reserved meanwhile.
                _set_usage(folder, kept + max(0, (now or 0) - (before or 0)))
            return True
        finally:
            _unlock(lock)

    def _files(self, folder: int) -> Iterator[tuple[int, int, str]]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if self._is_ours(status):
                            yield status.st_mtime_ns, status.st_size, entry.name

    def _is_ours(self, status: os.stat_result) -> bool:
        return stat.S_ISREG(status.st_mode) and status.st_uid == self._uid

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open our folder, created if absent: neither a link nor another user's."""
        for name in (_FOLDER, f"{_FOLDER}-{self._uid}"):
            path = os.path.join(self._parent, name)
            is_new = True
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                is_new = False
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
            except (NotADirectoryError, PermissionError):  # a link is not a directory
                continue
            try:
                status = os.fstat(folder)
                if status.st_uid == self._uid:
                    if status.st_mode & 0o022:
                        os.fchmod(folder, 0o700)
                    if is_new:
                        _count_from_zero(folder)
                    yield folder
                    return
            finally:
                os.close(folder)
        raise PermissionError(errno.EPERM, "its folders belong to another user")

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            self.notes.append(
                f"{self._parent}: caching stopped ({error.strerror or error}). "
                "Training continues, and fetches other blocks from storage."
            )


@contextmanager
def _usage_locked(folder: int) -> Iterator[None]:
    """Hold the lock of the file ``usage``, never during a listing."""
    file = _open_lock(folder)
    try:
        deadline = time.monotonic() + _USAGE_PATIENCE_S
        while not _lock(file, _USAGE_LOCK):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process hangs with the lock")
            time.sleep(_POLL_S / 10)
        yield
    finally:
        _unlock(file)


def _open_lock(folder: int) -> int:
    # A new open file each time, so that threads of a process exclude one another, too.
    return os.open("lock", os.O_RDWR | os.O_CREAT | _OPEN, 0o600, dir_fd=folder)


@contextmanager
def _opened_file(folder: int, name: str, flags: int) -> Iterator[int]:
    file = os.open(name, flags | _OPEN, 0o600, dir_fd=folder)
    try:
        yield file
    finally:
        os.close(file)


def _usage(folder: int) -> int | None:
    """Return the counted bytes; None if unknown until a listing."""
    with suppress(OSError, ValueError), _opened_file(folder, "usage", os.O_RDONLY) as file:
        return int(os.read(file, 32))
    return None


def _set_usage(folder: int, usage: int) -> None:
    with _opened_file(folder, "usage", os.O_WRONLY | os.O_CREAT) as file:
        os.ftruncate(file, os.pwrite(file, str(usage).encode().rjust(20), 0))


def _count_from_zero(folder: int) -> None:
    with _usage_locked(folder):
        if _usage(folder) is None:
            _set_usage(folder, 0)


def _finish(folder: int, file: int, part: str, name: str, content: bytes) -> None:
    """Write the content of a file from :meth:`HostCache._begin`, close and rename it."""
    header = _HEADER.pack(_MAGIC, crc32(content), len(content))
    try:
        if os.writev(file, [header, content]) < len(header) + len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise
    finally:
        os.close(file)


def _remove_if_dead(folder: int, part: str) -> bool:
    # OSError: its writer lives, or has just finished.
    with suppress(OSError), _opened_file(folder, part, os.O_RDONLY) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part, dir_fd=folder)
        return True
    return False


def _lock(file: int, number: int) -> bool:
    """Lock byte ``number`` until ``file`` is closed; false if already locked."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(file: int) -> None:
    """Unlock all bytes and close: a forked process still has the file open."""
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    os.close(file)


def _number(key: str) -> int:
    return int(key[:15], 16)
