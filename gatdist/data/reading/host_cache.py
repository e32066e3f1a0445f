"""Fetched blocks on a local disk, shared by the workers of a host and by several runs.

::

    <folder>/gatdist-blocks-1/
        lock             empty; byte k of it is locked by whoever fetches the block of number k
        usage            bytes of all blocks, in decimal
        0123abcd….block  one block: magic, CRC-32 and length of its content, then the content
        ….part           a block that is being written, and locked by its writer

A block's name is a digest of its shard's digest and its place there, so that other data sets, and
other versions of one, never meet. Locks are the kernel's and go with the process that held them:
after a kill at any moment there is nothing to clean up by hand.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from isal.isal_zlib import crc32

from gatdist.errors import StorageError

_FOLDER = "gatdist-blocks-1"
_HEADER = struct.Struct("<8sIQ")  # magic, CRC-32, length
_MAGIC = b"gatdist1"
# struct flock of Linux: type, whence, start, length, process (0 for locks of an open file).
_FLOCK = struct.Struct("hhqqi4x")
_USAGE_LOCK = 2**62  # above the number of any block
# Once full, it is emptied to this share at once, since to find what is oldest costs a listing.
_KEPT_SHARE = 0.9
_POLL_S = 0.005
# Who fetches a block may hang. Past this time, whoever waits for it fetches it too.
_PATIENCE_S = 20.0
_USAGE_PATIENCE_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

Load = Callable[[list[int]], list[bytes]]


def block_key(shard_digest: str, start: int, stop: int) -> str:
    """The name of bytes ``start`` to ``stop`` of the shard with that SHA-256 (hex)."""
    return hashlib.sha256(f"{shard_digest} {start} {stop}".encode()).hexdigest()[:40]


class HostCache:
    """Blocks by key. Safe to use from several threads and processes.

    It never fails later than at the start: what can't be written is not kept, and ``notes`` tells.

    Args:
        folder: made if absent; only a folder of our own in it is touched.
        max_bytes: the most that blocks may take. Of several runs that share the folder, the one
            with the lowest limit has its way.

    Attributes:
        notes: what to tell people, once.
        hits: blocks that were there.

    Raises:
        StorageError: the folder can't be used.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder = os.path.join(os.path.abspath(folder), _FOLDER)
        self._max_bytes = max_bytes
        self._writes = True
        self.notes: list[str] = []
        self.hits = 0
        try:
            os.makedirs(self._folder, exist_ok=True)
            with self._locking() as lock:
                self._lock_usage(lock)
                self._sweep()
                self._set_usage(sum(size for _, size, _ in self._blocks()))
        except OSError as error:
            if error.errno not in _FULL:
                raise StorageError(
                    "data.cache_dir",
                    f"can't be used ({error.strerror or error})",
                    value=folder,
                    mend="Choose a folder on a local disk that may be written to, or leave it out",
                ) from error
            self._stop_writing(error)

    def fetch(
        self, keys: Sequence[str], load: Load, stopped: Callable[[], bool] = lambda: False
    ) -> list[bytes]:
        """The blocks of ``keys``; each that is absent is loaded by one process, and kept.

        Args:
            keys: of :func:`block_key`, each once.
            load: gives the content of ``keys[i]`` for each i that it is asked for.
            stopped: asked while waiting for another process; true gives up.

        Returns:
            The content of each block; [] if given up.
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
        """Remove a block whose content has turned out to be damaged."""
        with suppress(OSError):
            os.unlink(self._path(key))

    def _load_unless_others_do(
        self, keys: Sequence[str], missing: list[int], load: Load
    ) -> dict[int, bytes]:
        """Those of the ``missing`` that nobody else is loading, or has loaded meanwhile."""
        try:
            lock = self._open_lock()
        except OSError as error:
            self._stop_writing(error)
            return {}
        try:
            # Nobody waits while holding a lock, lest two processes wait for one another.
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
        path = self._path(key)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            magic, crc, length = _HEADER.unpack(os.read(file, _HEADER.size))
            if magic == _MAGIC and os.fstat(file).st_size == _HEADER.size + length:
                content = os.pread(file, length, _HEADER.size)
                if len(content) == length and crc32(content) == crc:
                    with suppress(OSError):
                        os.utime(file)  # used just now
                    return content
        except (OSError, struct.error):
            pass  # torn by a power cut, or the disk fails
        finally:
            os.close(file)
        self.forget(key)
        return None

    def _write(self, key: str, content: bytes) -> None:
        size = _HEADER.size + len(content)
        if not self._writes or size > self._max_bytes:
            return
        part = f"{self._path(key)}-{secrets.token_hex(8)}.part"
        try:
            file = self._begin(part, size)
            try:
                written = os.writev(
                    file, [_HEADER.pack(_MAGIC, crc32(content), len(content)), content]
                )
                if written < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with suppress(FileNotFoundError):  # removed by another process to make room
                    os.replace(part, self._path(key))
            except BaseException:
                with suppress(OSError):
                    os.unlink(part)
                raise
            finally:
                os.close(file)
        except OSError as error:
            self._stop_writing(error)

    def _begin(self, part: str, size: int) -> int:
        """A new file, locked, for which there is room; what was not used for longest makes it."""
        with self._locking() as lock:
            self._lock_usage(lock)
            usage = self._usage()
            if usage + size > self._max_bytes:
                blocks = sorted(self._blocks())
                usage = sum(block_size for _, block_size, _ in blocks)
                target = max(0, int(self._max_bytes * _KEPT_SHARE) - size)
                for _, block_size, path in blocks:
                    if usage <= target:
                        break
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                    usage -= block_size
            self._set_usage(usage + size)
            # Whoever sweeps holds the lock, too, and finds the file absent or locked.
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file

    def _blocks(self) -> Iterator[tuple[int, int, str]]:
        """When it was used last, size, and path of each block, also of those being written."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith((".block", ".part")):
                    with suppress(FileNotFoundError):
                        facts = entry.stat()
                        yield facts.st_mtime_ns, facts.st_size, entry.path

    def _sweep(self) -> None:
        """Remove what dead processes were writing."""
        for _, _, path in list(self._blocks()):
            if not path.endswith(".part"):
                continue
            with suppress(OSError):  # its writer lives, or is just done
                file = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(file)

    def _usage(self) -> int:
        try:
            with open(os.path.join(self._folder, "usage")) as file:
                return int(file.read())
        except (OSError, ValueError):  # the listing will tell
            return self._max_bytes

    def _set_usage(self, usage: int) -> None:
        with open(os.path.join(self._folder, "usage"), "w") as file:
            file.write(str(usage))

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            self.notes.append(
                f"{os.path.dirname(self._folder)}: nothing more is cached here "
                f"({error.strerror or error}). Training goes on, and fetches again what is not "
                "there."
            )

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, f"{key}.block")

    @contextmanager
    def _locking(self) -> Iterator[int]:
        """A handle by which bytes of the lock file are locked until the end."""
        file = self._open_lock()
        try:
            yield file
        finally:
            os.close(file)

    def _open_lock(self) -> int:
        # An open file of its own each time: the threads of a process exclude one another, too.
        return os.open(os.path.join(self._folder, "lock"), os.O_RDWR | os.O_CREAT, 0o666)

    def _lock_usage(self, file: int) -> None:
        deadline = time.monotonic() + _USAGE_PATIENCE_S
        while not _lock(file, _USAGE_LOCK):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock and hangs")
            time.sleep(_POLL_S / 10)


def _lock(file: int, number: int) -> bool:
    """Lock byte ``number`` until ``file`` is closed; false if it is locked already."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _number(key: str) -> int:
    return int(key[:15], 16)
