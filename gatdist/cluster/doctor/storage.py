"""Storage as it is reached from this process: whether, and how fast."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from gatdist.cluster.doctor.report import Finding, rate, size
from gatdist.cluster.welcome import Token, left_token, storage_error
from gatdist.errors import GatdistError
from gatdist.storage import Store

_PREFIX = "doctor-"
# The next size is tried only where the one before was quick: slow storage must not be waited for.
_SIZES = (64_000, 1_000_000, 8_000_000)
_QUICK_S = 1.0
_BUDGET_S = 10.0


class StorageFacts(NamedTuple):
    """Of storage as one host reaches it.

    Attributes:
        error: why it can't be used from there; "" if it can.
        bytes: of the file that was written and read.
        write_s: seconds that writing it took.
        read_s: seconds that reading it took.
    """

    error: str
    bytes: int = 0
    write_s: float = 0.0
    read_s: float = 0.0


@contextmanager
def token(url: str, options: Mapping[str, Any]) -> Iterator[Token]:
    """A file that this process leaves in the folder at ``url`` for as long as hosts look for it.

    Raises:
        StorageError: it can't be written there.
        StorageUnavailableError: storage does not answer.
    """
    with left_token(Store(url, options, **_limits()), url, options, _PREFIX) as found:
        yield found


def look(expected: Token) -> StorageFacts:
    """Find what another process has written; then write, read back and delete a file of our own."""
    if error := storage_error(expected, **_limits()):
        return StorageFacts(error)
    found = StorageFacts("")
    try:
        store = Store(expected.url, expected.options, **_limits())
        for num_bytes in _SIZES:
            found = _timed(store, f"{_PREFIX}{uuid.uuid4().hex}", num_bytes)
            if found.error or max(found.write_s, found.read_s) > _QUICK_S:
                break
    except GatdistError as error:
        return StorageFacts(str(error))
    return found


def judge(facts: StorageFacts, url: str) -> Finding:
    """The verdict.

    Args:
        facts: of one host.
        url: of the folder, without secrets.
    """
    if facts.error:
        return Finding(
            "storage",
            facts.error,
            False,
            "Give all hosts the same storage, credentials and a way to it; a local path must be "
            "shared",
        )
    up, down = rate(facts.bytes / facts.write_s), rate(facts.bytes / facts.read_s)
    return Finding("storage", f"{up} up, {down} down, by {size(facts.bytes)} ({url})", True)


def shown(expected: Token) -> str:
    """The folder's URL without secrets."""
    return Store(expected.url, expected.options).url


def _timed(store: Store, name: str, num_bytes: int) -> StorageFacts:
    content = uuid.uuid4().bytes * (num_bytes // 16)
    try:
        began = time.perf_counter()
        store.publish(name, content)
        written = time.perf_counter()
        same = store.read(name) == content
        read = time.perf_counter()
    finally:
        with suppress(GatdistError):
            store.delete(name)
    error = "" if same else f"{store.url} gives other bytes than were written"
    return StorageFacts(error, len(content), written - began, read - written)


def _limits() -> dict[str, float]:
    return {"retry_budget_s": _BUDGET_S, "stall_s": _BUDGET_S}
