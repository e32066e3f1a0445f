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
from gatdist.packing.entries import Entry, Selection, Skipped, printable
from gatdist.packing.fetch import Contents, Fetcher
from gatdist.packing.outcome import Remarks, add_remark
from gatdist.packing.processes import Report, ShardTask
from gatdist.packing.processes import Worker as BaseWorker
from gatdist.packing.recipe import Recipe
from gatdist.packing.samples import Field, Samples
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

    fields: tuple[Field, ...]  # that of the generated field is the first
    has_labels: bool  # each sample gets the file ``cls``


class Record(BaseModel):
    """The result of a task."""

    model_config = ConfigDict(frozen=True)

    shard: Shard | None = None  # None if no sample could be packed
    skipped: list[Skipped] = []
    remarks: Remarks = {}
    components: list[list[str]] = []  # different file extensions of each field


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
        self._convert = Samples(job.fields)

    def __exit__(self, *exception: object) -> None:
        self._fetcher.__exit__(*exception)

    def do(self, task: Task, report: Report) -> Record:
        """Pack a shard, unless an earlier start has packed it."""
        name = f"shard-{task.number:06d}"
        record = self._record(f"{name}.json")
        if record:
            report(0, len(task.entries))
            return record
        found = Record(components=[[] for _ in self._job.fields])
        samples = self._samples(task, found, report)
        first = next(samples, None)  # a tar can't be empty
        shard = write_shard(self._dest, name, chain([first], samples)) if first else None
        record = found.model_copy(update={"shard": shard})
        self._notes.publish(f"{name}.json", record.model_dump_json().encode())
        return record

    def _samples(
        self, task: Task, found: Record, report: Report
    ) -> Iterator[tuple[str, Components]]:
        """Yield key and files of each sample; record what is found meanwhile."""
        for number, (entry, contents) in enumerate(self._fetcher.fetch(task.entries), task.first):
            report(1, 0)
            num_done = 0
            try:
                others = self._others(entry, contents)
                for num_done, sample in enumerate(self._convert(contents), 1):
                    for kind, detail in sample.remarks.items():
                        about = printable(entry.name) + (f" ({detail})" if detail else "")
                        add_remark(found.remarks, kind, about)
                    for known, component in zip(found.components, sample.components, strict=True):
                        if component not in known:
                            known.append(component)
                    # The fields' files are the first, and win over others of the same extension.
                    files = {**sample.components, **others, **sample.components}
                    yield self._key(number, num_done - 1), files
            except CodecError as error:
                kept = f" (after {num_done:,} clips, which are packed)" if num_done else ""
                found.skipped.append((printable(entry.name), f"{error}{kept}"))

    def _others(self, entry: Entry, contents: Contents) -> dict[str, bytes]:
        """Label and further files of an entry's samples. CodecError if one is unreadable."""
        others = {LABEL_COMPONENT: str(entry.label).encode()} if self._job.has_labels else {}
        for part, content in zip(entry.others, contents[len(entry.fields) :], strict=True):
            if isinstance(content, str):
                raise CodecError(content)
            others[part.component] = content
        return others

    def _key(self, number: int, clip: int) -> str:
        is_clip = self._job.recipe.clip_length is not None
        return f"{number:08d}-{clip:05d}" if is_clip else f"{number:08d}"

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
