"""The shards of a packing: which sample goes where, and the work of one shard."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gatdist.common.errors import StorageError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.labels import LABEL_COMPONENT
from gatdist.data.format.manifest import Shard
from gatdist.data.format.shard_files import Components, write_shard
from gatdist.packing.convert import CONVERTERS, Converter
from gatdist.packing.entries import Entry, Selection, Skipped, printable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.outcome import Remarks, add_remark
from gatdist.packing.processes import Report, ShardTask
from gatdist.packing.processes import Worker as BaseWorker
from gatdist.packing.recipe import Recipe
from gatdist.storage import Store

# The state of a packing; it may be deleted when the data set is complete.
NOTES = "packing"
_HASH_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Task(ShardTask):
    """One shard: its samples in order, and the number of the first one in the whole plan."""

    first: int
    entries: Sequence[Entry]

    @classmethod
    def from_json(cls, text: str) -> Self:
        number, first, entries = json.loads(text)
        return cls(number, first, [Entry.from_json(entry) for entry in entries])


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return the samples ordered by a hash of their names.

    This mixes classes in every shard, and does not depend on the order in which storage lists.
    """

    def key(entry: Entry) -> tuple[bytes, str]:
        name = entry.name.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(name, digest_size=8).digest(), entry.name

    return sorted(entries, key=key)


def cut(entries: Sequence[Entry], sizes: Sequence[float], shard_bytes: int) -> list[Task]:
    """Cut samples, at least one, into shards of about equal size, of at most about ``shard_bytes``.

    ``sizes`` are the estimated bytes of each sample in a shard.
    """
    total = sum(sizes)
    count = min(len(entries), max(1, math.ceil(total / shard_bytes)))
    ends: list[int] = []  # number of the sample after each shard's last
    for number, size in enumerate(accumulate(sizes), 1):
        if size >= total * (len(ends) + 1) / count and len(ends) < count - 1:
            ends.append(number)
    bounds = sorted({0, *ends, len(entries)})
    return [
        Task(number, first, entries[first:end])
        for number, (first, end) in enumerate(pairwise(bounds))
    ]


def fingerprint(tasks: Sequence[Task]) -> str:
    """Return a SHA-256 (hex) over the samples of each shard."""
    digest = hashlib.sha256()
    for task in tasks:
        samples: list[Any] = [[entry.name, entry.size, entry.label] for entry in task.entries]
        digest.update(json.dumps([task.number, task.first, samples]).encode())
    return digest.hexdigest()


class Request(BaseModel):
    """What to pack, and where; options as in :func:`gatdist.pack`."""

    model_config = ConfigDict(frozen=True)

    source: str
    dest: str
    recipe: Recipe = Recipe()
    selection: Selection = Selection()
    strict: bool = False
    source_options: dict[str, Any] = {}
    dest_options: dict[str, Any] = {}
    allowed_origins: tuple[str, ...] = ()


class Job(Request):
    """What all tasks share: a request whose source is the folder of the files, and more."""

    modality: str
    sample_shape: tuple[int, ...]  # after conversion
    has_labels: bool  # each sample gets the file ``cls``


class Record(BaseModel):
    """The result of a task."""

    model_config = ConfigDict(frozen=True)

    shard: Shard | None = None  # None if no sample could be packed
    skipped: list[Skipped] = []
    remarks: Remarks = {}


class Worker(BaseWorker[Record]):
    """Packs shards."""

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dest = Store(job.dest, job.dest_options)
        self._notes = self._dest.child(NOTES)
        source = Store(job.source, job.source_options)
        self._fetcher = Fetcher([source, self._notes.child("spool")], job.allowed_origins)
        self._convert: Converter = CONVERTERS[job.modality](job.recipe, job.sample_shape)

    def __exit__(self, *exception: object) -> None:
        self._fetcher.__exit__(*exception)

    def do(self, task: Task, report: Report) -> Record:
        """Pack a shard, unless an earlier start has packed it."""
        name = f"shard-{task.number:06d}"
        record = self._record(f"{name}.json")
        if record:
            report(0, len(task.entries))
            return record
        skipped: list[Skipped] = []
        remarks: Remarks = {}
        samples = self._samples(task, skipped, remarks, report)
        first = next(samples, None)  # a tar can't be empty
        shard = write_shard(self._dest, name, chain([first], samples)) if first else None
        record = Record(shard=shard, skipped=skipped, remarks=remarks)
        self._notes.publish(f"{name}.json", record.model_dump_json().encode())
        return record

    def _samples(
        self, task: Task, skipped: list[Skipped], remarks: Remarks, report: Report
    ) -> Iterator[tuple[str, Components]]:
        for number, (entry, files) in enumerate(self._fetcher.fetch(task.entries), task.first):
            report(1, 0)
            try:
                if isinstance(files, str):
                    raise CodecError(files)
                converted = self._convert(files[entry.component])
            except CodecError as error:
                skipped.append((printable(entry.name), str(error)))
                continue
            for kind, detail in converted.remarks.items():
                add_remark(
                    remarks, kind, printable(entry.name) + (f" ({detail})" if detail else "")
                )
            components = {converted.component: converted.content}
            if self._job.has_labels:
                components[LABEL_COMPONENT] = str(entry.label).encode()
            others = {name: content for name, content in files.items() if name != entry.component}
            yield f"{number:08d}", components | others

    def _record(self, name: str) -> Record | None:
        """The record of an earlier start, if its shard is complete."""
        if not self._notes.exists(name):
            return None
        try:
            record = Record.model_validate_json(self._notes.read(name))
            if record.shard is None or _is_complete(self._dest, record.shard):
                return record
        except (ValidationError, StorageError):
            pass
        return None


def _is_complete(store: Store, shard: Shard) -> bool:
    if store.size(shard.name) != shard.size:
        return False
    digest = hashlib.sha256()
    for start in range(0, shard.size, _HASH_CHUNK_BYTES):
        stop = min(start + _HASH_CHUNK_BYTES, shard.size)
        digest.update(store.read_ranges([(shard.name, start, stop)])[0])
    index = hashlib.sha256(store.read(shard.index)).hexdigest()
    return (digest.hexdigest(), index) == (shard.sha256, shard.index_sha256)
