"""Storage as it is reached from this process: whether a run works on it, and how fast it is.

What a run does is done by the same classes that a run uses, in a folder of the doctor's own, which
is deleted again.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from gatdist.cluster.doctor.report import Finding, rate, size
from gatdist.cluster.preflight import Token, left_token, storage_error
from gatdist.common.errors import GatdistError, StorageError
from gatdist.storage import Store

_PREFIX = "doctor-"
# The next size is tried only where the one before was quick: slow storage must not be waited for.
_SIZES = (64_000, 1_000_000, 8_000_000)
_LARGE_BYTES = 105_000_000  # what object stores take in several parts
_QUICK_S, _LARGE_S = 1.0, 4.0
_PROBE = "probe"
_BUDGET_S = 10.0


class StorageInfo(NamedTuple):
    """Of storage as one host reaches it.

    Attributes:
        error: why it can't be used from there; "" if it can.
        bytes: of the file that was written and read.
        write_s: seconds that writing it took.
        read_s: seconds that reading it took.
        note: what does not keep a run from working; "" for nothing.
    """

    error: str
    bytes: int = 0
    write_s: float = 0.0
    read_s: float = 0.0
    note: str = ""


@contextmanager
def token(url: str, options: Mapping[str, Any]) -> Iterator[Token]:
    """A file that this process leaves in the folder at ``url`` for as long as hosts look for it.

    Raises:
        StorageError: it can't be written there.
        StorageUnavailableError: storage does not answer.
    """
    with left_token(Store(url, options, **_limits()), url, options, _PREFIX) as found:
        yield found


def look(expected: Token) -> StorageInfo:
    """Find what another process has written; then do all that a run does, and delete it again."""
    if error := storage_error(expected, **_limits()):
        return StorageInfo(error)
    store = Store(expected.url, expected.options, **_limits())
    name = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        with _deleted_again(store, name):
            note = _as_a_run_does(store, name)
            found = _speed(store, name)
        if left := store.find(name):
            return StorageInfo(f"{store.url}/{name}: can't be deleted: {', '.join(left)} is left")
    except ImportError as error:
        return StorageInfo(f"can't be tried without what a run needs ({error})")
    except GatdistError as error:
        return StorageInfo(str(error))
    return found._replace(note="; ".join(filter(None, (note, found.note))))


@contextmanager
def _deleted_again(store: Store, name: str) -> Iterator[None]:
    """Deletes the folder at the end, also after a failure, which is the one that is raised then."""
    try:
        yield
    except GatdistError:
        with suppress(GatdistError):
            # Known without a listing, which may be what failed.
            store.delete_files([f"{name}/{_PROBE}"])
            store.delete(name)
        raise
    store.delete(name)


def _as_a_run_does(store: Store, name: str) -> str:
    """Each operation of a run. Returns a note.

    Raises:
        GatdistError: one failed.
    """
    _read_and_list(store, name)
    folder = store.child(name)
    for content in (b"first", b"second"):
        created = folder.create("created", content)
    note = (
        "conditional writes are ignored: of two starts at the same instant, the first may go on "
        "until its next checkpoint"
    )
    _attempt_and_checkpoints(folder)
    with tempfile.TemporaryDirectory() as spool:
        path = Path(spool) / "events"
        path.write_bytes(b"events")
        folder.publish_file("tensorboard/events", path)
    return note if created else ""


def _read_and_list(store: Store, name: str) -> None:
    """What else fails needs these to be deleted again."""
    content, probe = uuid.uuid4().bytes, f"{name}/{_PROBE}"
    store.publish(probe, content)
    missing = f"{name}/absent"
    found: dict[str, tuple[object, object]] = {
        "the content of a file": (store.read(probe), content),
        "a range of a file": (store.read_ranges([(probe, 3, 9)]), [content[3:9]]),
        "the size of a file": (store.size(probe), len(content)),
        "an absent file": (store.read_if_exists(missing), None),
        "whether an absent file exists": (store.exists(missing), False),
        "a listing": (store.list(name), [_PROBE]),
        "a listing of all files": (store.find(name), {probe: len(content)}),
    }
    for what, (is_, should_be) in found.items():
        if is_ != should_be:
            rule = f"gives {is_!r} for {what}, not {should_be!r}"
            raise StorageError(f"{store.url}/{name}", rule)


def _attempt_and_checkpoints(folder: Store) -> None:
    """An attempt that appends metrics, commits two checkpoints and deletes the first."""
    import torch

    from gatdist.runs import Checkpoints, Retention, RunDirectory, read_lines

    directory, warnings = RunDirectory(folder), list[str]()
    attempt = directory.start_attempt(["doctor"], None, "gatdist doctor")
    folder.append("metrics.jsonl", '{"samples_seen": 1}\n')
    folder.append("metrics.jsonl", '{"samples_seen": 2}\n')
    checkpoints = Checkpoints(
        folder.child("checkpoints"),
        Retention(newest=1),
        may_commit=directory.require_current,
        on_damaged=warnings.append,
        on_commit=directory.note_commit,
        on_warning=warnings.append,
    )
    for samples_seen in (1, 2):
        tensors = {"generator/weight": torch.full((8,), float(samples_seen))}
        checkpoints.save(samples_seen, tensors, {"samples_seen": samples_seen}, attempt=attempt)
    checkpoints.close()
    newest = checkpoints.newest()
    if warnings:
        raise StorageError(folder.url, warnings[0])
    if newest is None or newest.state != {"samples_seen": 2} or len(checkpoints.committed()) != 1:
        raise StorageError(folder.url, "does not give back the checkpoint that was committed")
    if len(read_lines(folder, "metrics.jsonl")) != 2:
        raise StorageError(folder.url, "does not give back the lines that were appended")


def _speed(store: Store, name: str) -> StorageInfo:
    """Of larger and larger files, as long as they do not take long."""
    sizes = _SIZES if store.is_local else (*_SIZES, _LARGE_BYTES)
    found = StorageInfo("")
    for num_bytes in sizes:
        found = _timed(store, f"{name}/large", num_bytes)
        if found.error or num_bytes == sizes[-1]:
            break
        slowest_s = max(found.write_s, found.read_s)
        limit_s = _LARGE_S * num_bytes / _LARGE_BYTES if num_bytes == _SIZES[-1] else _QUICK_S
        if slowest_s > limit_s:
            note = f"slow: larger files than {size(num_bytes)} were not tried"
            return found._replace(note=note)
    return found


def judge(facts: StorageInfo, url: str) -> Finding:
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
    note = f"; {facts.note}" if facts.note else ""
    return Finding("storage", f"{up} up, {down} down, by {size(facts.bytes)} ({url}){note}", True)


def shown(expected: Token) -> str:
    """The folder's URL without secrets."""
    return Store(expected.url, expected.options).url


def _timed(store: Store, name: str, num_bytes: int) -> StorageInfo:
    content = uuid.uuid4().bytes * (num_bytes // 16)
    began = time.perf_counter()
    store.publish(name, content)
    written = time.perf_counter()
    same = store.read(name) == content
    read = time.perf_counter()
    error = "" if same else f"{store.url} gives other bytes than were written"
    return StorageInfo(error, len(content), written - began, read - written)


def _limits() -> dict[str, float]:
    return {"retry_budget_s": _BUDGET_S, "stall_s": _BUDGET_S}
