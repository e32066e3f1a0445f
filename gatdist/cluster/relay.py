"""Heartbeats of the workers on one host, which one of them sends for all.

What a heartbeat costs the driver is the message, not what is in it. So the workers of a host share
a folder in memory: each writes its heartbeat to a file there, and reads the driver's orders from
another. The worker that holds a lock sends all heartbeats and writes the orders. The lock is free
once its process has ended; while that hangs, the others send their own.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from gatdist.cluster.policies import HEARTBEAT_S, STALE_INTERVALS

Fields = dict[str, Any]
Orders = dict[str, Any]

_MEMORY = Path("/dev/shm")
_BEAT, _ORDERS, _LOCK = ".heartbeat", "orders", "lock"
# Older ones are of workers that have ended.
_ENDED_S = 60.0
# Folders without a heartbeat for so long are of launches that have ended.
_LEFT_S = 86400.0


def shared_folder(name: str) -> Path | None:
    """Make a folder that only this user's processes on this host can use; None if that fails."""
    above = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    folder = above / f"gatdist-{os.geteuid()}-{name}"
    with suppress(OSError):
        for left in above.glob(f"gatdist-{os.geteuid()}-*"):  # by workers that were killed
            if time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_mine = found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if is_mine and stat.S_ISDIR(found.st_mode) else None


class Relay:
    """A worker's way to the driver's mailbox, by one thread.

    Args:
        folder: from :func:`shared_folder`; None: this worker sends its own heartbeats.
        worker: its name, which is never used again, without ``/``.
        send: sends heartbeats, and returns orders to all workers or, if they are void, None.

    Attributes:
        interval_s: seconds between heartbeats, as the driver's orders say.
    """

    def __init__(
        self,
        folder: Path | None,
        worker: str,
        send: Callable[[Sequence[Fields]], Orders | None],
    ) -> None:
        self._folder, self._worker, self._send = folder, worker, send
        self._lock: int | None = None
        self._sent: dict[str, float] = {}  # when the last heartbeat sent was written, by file
        self._began = time.monotonic()
        self.interval_s = HEARTBEAT_S

    def exchange(self, fields: Fields) -> Orders | None:
        """Send a heartbeat of this worker, and return the newest orders known on this host."""
        beat = fields | {"at": time.monotonic()}
        orders = self._through_folder(beat) if self._folder else self._sent_now([beat])
        if orders:
            self.interval_s = orders["interval_s"]
        return orders

    def close(self) -> None:
        """Delete this worker's files, and the folder once it is empty."""
        if self._folder is None:
            return
        with suppress(OSError):
            (self._folder / f"{self._worker}{_BEAT}").unlink()
            if not [*self._folder.glob(f"*{_BEAT}")]:
                for name in (_ORDERS, _LOCK):
                    (self._folder / name).unlink(missing_ok=True)
                self._folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    def _through_folder(self, beat: Fields) -> Orders | None:
        assert self._folder is not None
        try:
            _write(self._folder / f"{self._worker}{_BEAT}", beat)
            if self._leads():
                orders = self._sent_now(self._new_beats())
                _write(self._folder / _ORDERS, {"at": time.monotonic(), "orders": orders})
                return orders
            found = _read(self._folder / _ORDERS) or {"at": self._began, "orders": None}
        except (OSError, ValueError):  # the folder is full, was deleted, or can't be locked
            return self._sent_now([beat])
        if time.monotonic() - found["at"] > STALE_INTERVALS * self.interval_s:
            return self._sent_now([beat])
        return cast(Orders | None, found["orders"])

    def _leads(self) -> bool:
        """Whether this worker holds the lock, which it takes if that is free."""
        if self._lock is None:
            assert self._folder is not None
            lock = os.open(self._folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            except OSError:
                os.close(lock)
                raise
            else:
                self._lock = lock
        return self._lock is not None

    def _new_beats(self) -> list[Fields]:
        """Return the heartbeats on this host that have not been sent."""
        assert self._folder is not None
        found, now = [], time.monotonic()
        for file in self._folder.glob(f"*{_BEAT}"):
            beat = _read(file)
            if beat is None or beat["at"] <= self._sent.get(file.name, -math.inf):
                continue
            self._sent[file.name] = beat["at"]
            if now - beat["at"] < _ENDED_S:
                found.append(beat)
            else:
                file.unlink(missing_ok=True)
        return found

    def _sent_now(self, beats: Sequence[Fields]) -> Orders | None:
        now = time.monotonic()
        return self._send([beat | {"age_s": now - beat["at"]} for beat in beats])


def _write(file: Path, values: Fields) -> None:
    new = file.with_name(f"{file.name}-{os.getpid()}")
    new.write_text(json.dumps(values))
    new.replace(file)


def _read(file: Path) -> Fields | None:
    try:
        found: Fields = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    return found
