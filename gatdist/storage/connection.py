"""Connection to a folder's file system: reopened when credentials expire, with retries."""

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
from gatdist.storage.backends import backend_of, open_file_system, redact_secrets, secrets_of
from gatdist.storage.urls import is_exact, origin

T = TypeVar("T")

# Not Python's shared generator, which is seeded identically on every rank.
_JITTER = random.SystemRandom()
_FIRST_DELAY_S, _MAX_DELAY_S = 0.05, 10.0
# A name with these must stay quoted in a URL.
_SPECIAL = re.compile(r"\?|%[0-9A-Fa-f]{2}")
_WARN_AFTER_S = 5.0  # of retries, in the foreground of a command
_LOGGER = logging.getLogger(__name__)


class OneOfManyError(Exception):
    """One file of a batch operation failed; ``progressed`` if others succeeded."""

    def __init__(self, name: str, error: Exception, *, progressed: bool) -> None:
        super().__init__()
        self.name, self.error, self.progressed = name, error, progressed


class Connection:
    """File system of a folder's URL. ``url`` has secrets; ``root`` is the folder's path on it."""

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
        return origin(expand_env(self.url))

    def child_url(self, name: str) -> str:
        """Return the URL of a subfolder, with secrets. The name may be from a listing."""
        if REFERENCE.search(name) or "://" in name or ".." in name.split("/"):
            rule = "is not the name of a subfolder"
            raise StorageError(self.shown(name), rule, hint="Rename it")
        return _joined(self.url, name)

    def path(self, name: str) -> str:
        """Return the path of a file. Raises StorageError if it would mean another file."""
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
            rule = "means another name or a version in this kind of storage"
            raise StorageError(self.shown(name), rule, hint="Use a name without ? and #")

    def name(self, path: str) -> str:
        """Return the name of a listed path; "" of a link that only sorts the listing."""
        if not self.is_http:
            return path
        plain = unquote(path)
        if "?" in path:
            return ""
        return path if _SPECIAL.search(plain) else plain

    def shown(self, name: str = "") -> str:
        return redact_url(_joined(self.url, name))

    def run(self, name: str, operation: Callable[[Any], T]) -> T:
        """Return ``operation(file_system)``, retried on transient failures within the budget.

        Raises StorageError for permanent failures, StorageUnavailableError after the budget.
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
                if not failures.is_transient(error):
                    explained = self._explained(name, error)
                    raise explained from (None if explained is error else error)
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
                if began and now - began > _WARN_AFTER_S and _is_in_foreground():
                    _LOGGER.warning(
                        for_terminal(
                            f"{self.shown(name)}: no success for {now - began:.0f} s "
                            f"({self._reported(error)}); retrying for {left_s:.0f} s more"
                        )
                    )
                    began = 0.0
                # Jitter keeps workers from retrying at the same moment.
                pause_s = delay_s * (0.5 + _JITTER.random())
                time.sleep(min(max(pause_s, failures.retry_after_s(error)), left_s))
                delay_s = min(2 * delay_s, _MAX_DELAY_S)

    def _open(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._file_system, root = open_file_system(self.url, self._options, self._stall_s)
        self.root = root if self.is_http and "?" in root else root.rstrip("/")
        self._secrets = secrets_of(self.url, self._options)
        self._require_exact("")

    def _present(self) -> Any:
        """Return the file system; a new one after a fork, which fsspec's do not survive."""
        if self._process != os.getpid():
            self._open()
        return self._file_system

    def _renew(self, stale: Any) -> None:
        with self._lock:
            if self._file_system is stale:
                type(stale).clear_instance_cache()
                self._connect()

    def _explained(self, name: str, error: Exception) -> Exception:
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
                listing = f"; without {listing}, absent files are refused, too"
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
        """Return an error's message in one line, without secrets; "" if it is only a path."""
        if isinstance(error, OSError) and error.strerror and error.filename:
            return error.strerror  # the path is in the message already
        lines = (failures.answer(error).message or str(error)).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
        if " " not in message and "/" in message:
            return ""
        return redact_secrets(self._secrets, message).rstrip(".")


def _joined(base: str, name: str) -> str:
    """Return the URL of ``name`` in a folder, whose query (a signature?) applies to every file."""
    if not name:
        return base
    query = ""
    if base.startswith(("http://", "https://")):
        name = re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(name, safe="/?:@!$&'()*+,;=~%"))
        base, mark, query = base.partition("?")
        query = f"&{query}" if "?" in name and mark else mark + query
    slash = "" if base.endswith("/") else "/"  # memory:// keeps its slashes
    return f"{base}{slash}{name}{query}"


def _is_in_foreground() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and multiprocessing.parent_process() is None


def _obstacle(path: str) -> str:
    """Return what stands in place of a parent folder of a path; "" if nothing does."""
    for folder in map(str, Path(path).parents):
        if os.path.isdir(folder):
            return ""
        if os.path.islink(folder):
            return f"{folder} is a link, but not to a folder"
        if os.path.exists(folder):
            return f"{folder} is not a folder"
    return ""
