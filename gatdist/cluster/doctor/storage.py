"""Checks that a run works on storage as it is reached from this process, and how fast it is.

The same classes as in a run do what a run does, in a folder that is deleted again.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from gatdist.cluster import preflight
from gatdist.cluster.doctor.report import Finding, rate, size
from gatdist.cluster.preflight import Marker, storage_error
from gatdist.common.errors import GatdistError, StorageError
from gatdist.storage import Store

_PREFIX = "doctor-"
# A larger file is tried only after a quick one.
_SIZES = (64_000, 1_000_000, 8_000_000)
_LARGE_BYTES = 105_000_000  # what object stores take in several parts
_QUICK_S, _LARGE_S = 1.0, 4.0
_PROBE = "probe"
_LIMITS = {"retry_budget_s": 10.0, "stall_s": 10.0}


class StorageInfo(NamedTuple):
    """Storage as one host reaches it: why it is unusable ("" if it is usable), or its speed."""

    error: str
    bytes: int = 0  # of the file that was written and read
    write_s: float = 0.0
    read_s: float = 0.0
    note: str = ""  # a limitation with which a run works


def marker(url: str, options: Mapping[str, Any]) -> AbstractContextManager[Marker]:
    """See :func:`gatdist.cluster.preflight.marker`."""
    return preflight.marker(url, options, _PREFIX, **_LIMITS)


def look(expected: Marker) -> StorageInfo:
    """Find another process's file; then do all that a run does, and delete it again."""
    if error := storage_error(expected, **_LIMITS):
        return StorageInfo(error)
    store = expected.store(**_LIMITS)
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
    """Delete the folder at the end. A failure before that is raised rather than one of deleting."""
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
    """Try each operation of a run. Returns a note.

    Raises:
        GatdistError: an operation failed.
    """
    _read_and_list(store, name)
    folder = store.child(name)
    for content in (b"first", b"second"):
        created = folder.create("created", content)
    note = (
        "conditional writes are ignored: of two starts at the same instant, the first may continue "
        "until its next checkpoint"
    )
    _attempt_and_checkpoints(folder)
    with tempfile.TemporaryDirectory() as spool:
        path = Path(spool) / "events"
        path.write_bytes(b"events")
        folder.publish_file("tensorboard/events", path)
    return note if created else ""


def _read_and_list(store: Store, name: str) -> None:
    """Try the operations that deleting needs."""
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
    """Start an attempt that appends metrics, commits two checkpoints and deletes the first."""
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
        raise StorageError(folder.url, "does not return the checkpoint that was committed")
    if len(read_lines(folder, "metrics.jsonl")) != 2:
        raise StorageError(folder.url, "does not return the lines that were appended")


def _speed(store: Store, name: str) -> StorageInfo:
    """Time larger and larger files while they are quick."""
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


def _timed(store: Store, name: str, num_bytes: int) -> StorageInfo:
    content = uuid.uuid4().bytes * (num_bytes // 16)
    began = time.perf_counter()
    store.publish(name, content)
    written = time.perf_counter()
    same = store.read(name) == content
    read = time.perf_counter()
    error = "" if same else f"{store.url} returns other bytes than were written"
    return StorageInfo(error, len(content), written - began, read - written)


def assess(info: StorageInfo, url: str) -> Finding:
    """Assess one host's storage at ``url``, which has no secrets."""
    if info.error:
        hint = "Give all hosts the same storage, credentials and network; a local path must be "
        return Finding("storage", info.error, False, f"{hint}shared")
    up, down = rate(info.bytes / info.write_s), rate(info.bytes / info.read_s)
    note = f"; {info.note}" if info.note else ""
    return Finding("storage", f"{up} up, {down} down, by {size(info.bytes)} ({url}){note}", True)
