"""The metrics of a run: one JSON object per log interval, ``samples_seen`` strictly increasing.

On a local disk they are appended to ``metrics.jsonl``. Object stores cannot append: there, each
upload adds a segment, ``metrics/<first samples_seen>.jsonl``. Segments are merged into
``metrics.jsonl`` when the run ends, and in long runs each time their size has doubled.
:func:`read_metrics` reads both, at any time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gatdist.common.strict_json import parse_json
from gatdist.monitor.uploads import MIN_GROWTH, RETRY_BUDGET_S

if TYPE_CHECKING:
    from gatdist.storage import Store

METRICS_FILE = "metrics.jsonl"
SEGMENTS_FOLDER = "metrics"
# With fewer segments, they are merged at the end only.
_MAX_SEGMENTS = 256
_SEGMENT = re.compile(r"\d{12,18}\.jsonl", re.ASCII)
_CONCURRENCY = 16

Record = dict[str, Any]


@dataclass
class Metrics:
    """Metrics as read; ``records`` by increasing ``samples_seen``."""

    records: list[Record] = field(default_factory=list)
    num_lines: int = 0  # that are not blank
    num_damaged: int = 0  # lines without an integer ``samples_seen``
    exists: bool = False


def read_metrics(store: Store) -> Metrics:
    """Read the metrics of the run in ``store``, even while it is running.

    Records of the same ``samples_seen`` are merged; later values win.
    """
    # Segments are deleted only after metrics.jsonl includes them, so it is read last.
    segments = _read_all(store, _segments(store))
    contents = [store.read_if_exists(METRICS_FILE), *segments.values()]
    found, merged = Metrics(), dict[int, Record]()
    for content in contents:
        if content is None:
            continue
        found.exists = True
        for line in filter(str.strip, content.decode(errors="replace").splitlines()):
            found.num_lines += 1
            if record := _parse(line):
                seen = record["samples_seen"]
                merged[seen] = merged.get(seen, {}) | record
            else:
                found.num_damaged += 1
    found.records = [merged[seen] for seen in sorted(merged)]
    return found


class MetricsWriter:
    """Writes the metrics of a run; keeps lines that cannot be written. Not thread-safe.

    Records beyond ``resume_samples`` and damaged lines are removed. ``unwritten`` are records in
    the checkpoint, which could not be written before it.
    """

    def __init__(self, store: Store, resume_samples: int, unwritten: Iterable[Record] = ()) -> None:
        self._store = store
        self._hasty = store.with_retry_budget(RETRY_BUDGET_S)
        self._pending: dict[int, Record] = {}
        self._segments: dict[str, int] = {}  # bytes of each
        self._merged_bytes = 0
        self._last: Record = {"samples_seen": -1}
        self._cut(resume_samples)
        self._written = int(self._last["samples_seen"])
        for record in unwritten:
            if _is_record(record) and self._written < record["samples_seen"] <= resume_samples:
                self._pending[record["samples_seen"]] = self._last = dict(record)

    @property
    def unwritten(self) -> list[Record]:
        return list(self._pending.values())

    def add(self, samples_seen: int, values: Mapping[str, Any]) -> None:
        """Add JSON values. A second call with the same ``samples_seen`` adds to the same record."""
        last = self._last["samples_seen"]
        assert samples_seen >= last, f"samples_seen decreased from {last} to {samples_seen}"
        new = {key: _json_value(value) for key, value in values.items()}
        before = self._last if samples_seen == last else {}
        self._last = before | {"samples_seen": samples_seen} | new
        self._pending[samples_seen] = self._last

    def flush(self, *, force: bool = True) -> None:
        """Write pending records. They stay pending if StorageError is raised.

        Without ``force``, small amounts stay pending on object stores (see the module), and retries
        are shorter.
        """
        if not self._pending:
            return
        store = self._store if force else self._hasty
        data = b"".join(map(_line, self._pending.values()))
        first = next(iter(self._pending))
        if not store.is_local:
            so_far = self._merged_bytes + sum(self._segments.values())
            if not force and len(data) < so_far * MIN_GROWTH:
                return
            name = f"{SEGMENTS_FOLDER}/{first:012d}.jsonl"
            store.publish(name, data)
            self._segments[name] = len(data)
        elif first == self._written:
            lines = store.read(METRICS_FILE).splitlines(keepends=True)
            store.publish(METRICS_FILE, b"".join(lines[:-1]) + data)
        else:
            store.append(METRICS_FILE, data)
        self._written = int(self._last["samples_seen"])
        self._pending.clear()
        is_many = len(self._segments) > _MAX_SEGMENTS
        if is_many and sum(self._segments.values()) >= self._merged_bytes:
            self.merge()

    def merge(self) -> None:
        """Merge all segments into ``metrics.jsonl``."""
        if not self._segments:
            return
        content = b"".join(map(_line, read_metrics(self._store).records))
        self._store.publish(METRICS_FILE, content)
        self._merged_bytes = len(content)
        self._store.delete_files(self._segments)
        self._segments.clear()

    def _cut(self, resume_samples: int) -> None:
        names = _segments(self._store)
        files = {METRICS_FILE: self._store.read_if_exists(METRICS_FILE)}
        files |= _read_all(self._store, names)
        for name, old in files.items():
            if old is None:
                continue
            kept, last = list[bytes](), -1
            for line in old.decode(errors="replace").splitlines():
                record = _parse(line)
                if record and last < record["samples_seen"] <= resume_samples:
                    kept.append(line.encode() + b"\n")
                    last = record["samples_seen"]
                    if last > self._last["samples_seen"]:
                        self._last = record
                    elif last == self._last["samples_seen"]:
                        self._last = self._last | record
            new = b"".join(kept)
            if not new and name != METRICS_FILE:
                self._store.delete_files([name])
                continue
            if new != old:
                self._store.publish(name, new)
            if name == METRICS_FILE:
                self._merged_bytes = len(new)
            else:
                self._segments[name] = len(new)
        if self._store.is_local:  # copied from an object store
            self.merge()


def _segments(store: Store) -> list[str]:
    names = filter(_SEGMENT.fullmatch, store.list(SEGMENTS_FOLDER))
    return [f"{SEGMENTS_FOLDER}/{name}" for name in names]


def _read_all(store: Store, names: list[str]) -> dict[str, bytes | None]:
    with ThreadPoolExecutor(_CONCURRENCY) as threads:
        return dict(zip(names, threads.map(store.read_if_exists, names), strict=True))


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parse(line: str) -> Record | None:
    try:
        record = parse_json(line, int64=True)
    except ValueError:
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("samples_seen")) is int


def _json_value(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
