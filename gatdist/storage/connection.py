"""A file system in use: opened, opened anew when its credentials expire, and tried again.

What an operation does is given as a function of the fsspec file system, so that it can be done
once more on another one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fsspec.implementations.local import LocalFileSystem

from gatdist.common.errors import StorageError, StorageUnavailableError, for_terminal
from gatdist.common.heartbeat import beat
from gatdist.config import REFERENCE, expand_env, redact_url
from gatdist.storage import failures
from gatdist.storage.backends import backend_of, open_file_system, secrets_of, without
from gatdist.storage.origin import origin
from gatdist.storage.urls import is_exact

T = TypeVar("T")

# Its own: Python's shared generator is seeded for users' networks, alike on all workers.
_JITTER = random.SystemRandom()
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 10.0
# In a URL; a name with it must stay quoted.
_MEANS_SOMETHING = re.compile(r"\?|%[0-9A-Fa-f]{2}")
# A person who waits for a command is told why, once, if an operation takes longer.
_REPORT_AFTER_S = 5.0
_LOGGER = logging.getLogger(__name__)


class OneOfManyError(Exception):
    """Of many things that one operation does, the one with this name failed.

    Args:
        name: of a file.
        error: what it failed with.
        progressed: whether others were done, which will not be asked for again.
    """

    def __init__(self, name: str, error: Exception, *, progressed: bool) -> None:
        super().__init__()
        self.name, self.error, self.progressed = name, error, progressed


class Connection:
    """The file system of a folder's URL. See :class:`~gatdist.storage.Store` for the arguments.

    Attributes:
        url: as given, secrets and all: to open another with.
        root: the folder's path on the file system.
        is_local: whether that is one of this machine.
        is_http: whether files are read by plain HTTP(S).
    """

    def __init__(
        self, url: str, options: Mapping[str, Any], *, retry_budget_s: float, stall_s: float
    ) -> None:
        if "\0" in url:
            raise StorageError(redact_url(url), "contains a NUL character", hint="Check the URL")
        self.url, self._options = url, dict(options)
        self._retry_budget_s, self._stall_s = retry_budget_s, stall_s
        self.is_http = url.startswith(("http://", "https://"))
        self._open()
        self.is_local = isinstance(self._file_system, LocalFileSystem)

    @property
    def origin(self) -> str:
        """See :mod:`gatdist.storage.origin`."""
        return origin(expand_env(self.url))

    def child_url(self, name: str) -> str:
        """Of the folder ``name`` in this one, secrets and all. The name may be from a listing."""
        if REFERENCE.search(name) or "://" in name or ".." in name.split("/"):
            rule = "is no name of a folder in this one"
            raise StorageError(self.shown(name), rule, hint="Rename it")
        return _joined(self.url, name)

    def path(self, name: str) -> str:
        """Where a file is on the file system.

        Raises:
            StorageError: the file system would take it for another name.
        """
        if self.is_http:
            return _joined(self.root, name)
        self._require_exact(name)
        return self._plain_path(name)

    def _plain_path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root or "/"

    def _require_exact(self, name: str) -> None:
        if "\0" in name:
            raise StorageError(self.shown(name), "contains a NUL character", hint="Check the name")
        if not self.is_http and not is_exact(self._file_system, self._plain_path(name)):
            rule = "is a name that this kind of storage takes for another one, or for a version"
            raise StorageError(self.shown(name), rule, hint="Use a name without ? and #")

    def name(self, path: str) -> str:
        """The name of what a listing calls so; "" for a link that only sorts a page of links."""
        if not self.is_http:
            return path
        plain = unquote(path)
        if "?" in path:
            return ""
        return path if _MEANS_SOMETHING.search(plain) else plain

    def shown(self, name: str = "") -> str:
        """The URL of a file, without secrets."""
        return redact_url(_joined(self.url, name))

    def run(self, name: str, operation: Callable[[Any], T]) -> T:
        """``operation(file_system)``; on a passing failure again, until the budget is used up.

        Args:
            name: of the file that it is about, to be told. See also :class:`OneOfManyError`.
            operation: raises what the file system does.

        Raises:
            StorageError: another failure of storage. Failures that are none are raised as they are.
            StorageUnavailableError: the budget is used up.
        """
        attempts, delay_s, failing_since, is_renewed = 0, _FIRST_DELAY_S, 0.0, False
        began = time.monotonic()
        while True:
            attempts += 1
            file_system = self._present()
            try:
                found = operation(file_system)
                beat()
                return found
            except (StorageError, StorageUnavailableError):
                raise
            except Exception as failure:
                error = failure
                if isinstance(failure, OneOfManyError):
                    name, error = failure.name, failure.error
                    if failure.progressed:
                        delay_s, failing_since = _FIRST_DELAY_S, 0.0
                if failures.is_expired(error) and not is_renewed:
                    is_renewed = True
                    self._renew(file_system)
                    continue
                if not failures.is_passing(error):
                    message = self._lasting(name, error)
                    raise message from (None if message is error else error)
                now = time.monotonic()
                failing_since = failing_since or now
                left_s = self._retry_budget_s - (now - failing_since)
                if left_s <= 0:
                    hint = failures.hint(error) or "Check that it is up and has room"
                    raise StorageUnavailableError(
                        f"{self.shown(name)}: storage kept failing, {attempts} attempts in "
                        f"{now - failing_since:.0f} s ({self._reported(error)}). {hint}, then run "
                        "the same command again."
                    ) from error
                if began and now - began > _REPORT_AFTER_S and _is_waited_for():
                    _LOGGER.warning(
                        for_terminal(
                            f"{self.shown(name)}: no success for {now - began:.0f} s "
                            f"({self._reported(error)}); trying for {left_s:.0f} s more"
                        )
                    )
                    began = 0.0
                # Jitter keeps many workers from coming back at the same moment.
                pause_s = delay_s * (0.5 + _JITTER.random())
                time.sleep(min(max(pause_s, failures.retry_after_s(error)), left_s))
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _open(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._file_system, root = open_file_system(self.url, self._options, self._stall_s)
        self.root = root if self.is_http and "?" in root else root.rstrip("/")
        self._secrets = secrets_of(self.url, self._options)
        self._require_exact("")

    def _present(self) -> Any:
        """The file system; one of its own for a process that was forked: fsspec's do not fork."""
        if self._process != os.getpid():
            self._open()
        return self._file_system

    def _renew(self, stale: Any) -> None:
        """Open the file system anew, unless another thread has done it."""
        with self._lock:
            if self._file_system is stale:
                type(stale).clear_instance_cache()
                self._connect()

    def _lasting(self, name: str, error: Exception) -> Exception:
        """A failure that will not pass, as the user is told; itself, if it is none of storage."""
        rule = "" if isinstance(error, StorageError) else failures.meaning(error)
        if not rule:
            return error
        if self.is_local:
            if obstacle := _obstacle(self.path(name)):
                hint = "Check it, or choose another path"
                return StorageError(self.shown(name), obstacle, hint=hint)
            hints = {"does not exist": "Check the path", "not permitted": "Check its permissions"}
        else:
            source = backend_of(self.url).credentials
            source = f" ({source}, or storage_options)" if source else ""
            listing = backend_of(self.url).listing
            if listing:
                listing = f"; without {listing}, absent files are not permitted either"
            bucket = "" if self.is_http else "; the bucket must exist already"
            hints = {
                "does not exist": f"Check the URL{bucket}",
                "not permitted": f"Check the credentials{source} and their rights{listing}",
                "can't be written": "Choose another kind of storage",
            }
        message = self._reported(error)
        return StorageError(
            self.shown(name),
            f"{rule} ({message})" if message else rule,
            hint=failures.hint(error) or hints.get(rule, "Check the URL and storage_options"),
        )

    def _reported(self, error: Exception) -> str:
        """What the error says, in one line and without secrets; "" if that is but a path."""
        if isinstance(error, OSError) and error.strerror and error.filename:
            return error.strerror  # the path is told already
        lines = (failures.answer(error).message or str(error)).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
        if " " not in message and "/" in message:
            return ""
        return without(self._secrets, message).rstrip(".")


def _joined(base: str, name: str) -> str:
    """The URL of ``name`` in a folder.

    By HTTP a name may be quoted, and have a query, as in a list of URLs. The folder's own query,
    which may be its signature, is every file's.
    """
    if not name:
        return base
    query = ""
    if base.startswith(("http://", "https://")):
        name = re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(name, safe="/?:@!$&'()*+,;=~%"))
        base, mark, query = base.partition("?")
        query = f"&{query}" if "?" in name and mark else mark + query
    slash = "" if base.endswith("/") else "/"  # of memory:// none may be taken away
    return f"{base}{slash}{name}{query}"


def _is_waited_for() -> bool:
    """Whether this is the thread of a command, and not one of its helpers."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and multiprocessing.parent_process() is None


def _obstacle(path: str) -> str:
    """Why nothing can be below a path: what is there in place of a folder; "" if nothing is."""
    for folder in map(str, Path(path).parents):
        if os.path.isdir(folder):
            return ""
        if os.path.islink(folder):
            return f"{folder} is a link that leads to no folder"
        if os.path.exists(folder):
            return f"{folder} is no folder"
    return ""
