"""Packs one shard; done again, it finds the shard there and leaves it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs import LABEL_COMPONENT, CodecError
from gatdist.data.format import Components, Shard, write_shard
from gatdist.packing.convert import converter
from gatdist.packing.converted import Converter
from gatdist.packing.entries import Skipped, all_named, printable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.plan import Task
from gatdist.packing.processes import Report
from gatdist.packing.recipe import Recipe
from gatdist.storage import Store

# What a rerun needs to know; the folder may be deleted when a data set is whole.
NOTES = "packing"
_HASHED_AT_ONCE_BYTES = 8 * 2**20


class Job(BaseModel):
    """What all tasks of a packing share, as JSON can carry it.

    Attributes:
        source: URL of the folder that the entries' files are in.
        source_options: of its storage.
        dest: URL of the data set.
        dest_options: of its storage.
        allowed_origins: others than the source's that entries may be read from.
        recipe: what is done to each sample.
        modality: of the source's samples.
        sample_shape: of what is packed.
        has_labels: each sample gets the file ``cls``.
        strict: samples that can't be packed are an error, when all are known.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    source_options: dict[str, Any]
    dest: str
    dest_options: dict[str, Any]
    allowed_origins: list[str] = []
    recipe: Recipe
    modality: str
    sample_shape: tuple[int, ...]
    has_labels: bool
    strict: bool


class Record(BaseModel):
    """What became of a task.

    Attributes:
        shard: what was written; None where no sample could be packed.
        skipped: name and reason of each sample that was not.
        remarks: of each of ``REMARKS`` that came up, how many samples, and the first, with details.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard | None = None
    skipped: list[Skipped] = []
    remarks: dict[str, tuple[int, str]] = {}


class Worker:
    """Does tasks of one job. A context manager, which ends its threads.

    Args:
        job: what all tasks share.
    """

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dest = Store(job.dest, job.dest_options)
        self._notes = self._dest.child(NOTES)
        source = Store(job.source, job.source_options)
        self._fetcher = Fetcher([source, self._notes.child("spool")], job.allowed_origins)
        self._convert: Converter = converter(job.modality, job.recipe, job.sample_shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._fetcher.__exit__(*exception)

    def do(self, task: Task, report: Report) -> Record:
        """Pack a shard, or find that it was packed already.

        Args:
            task: which samples.
            report: is called now and then.

        Raises:
            StorageError: the source can't be read, or nothing be written to the destination.
        """
        name = f"shard-{task.number:06d}"
        record = self._record(f"{name}.json")
        if record is None:
            record = self._pack(name, task, report)
            self._notes.publish(f"{name}.json", record.model_dump_json().encode())
        else:
            report(0, len(task.entries))
        return record

    def _pack(self, name: str, task: Task, report: Report) -> Record:
        skipped: list[Skipped] = []
        remarks: dict[str, tuple[int, str]] = {}
        samples = self._samples(task, skipped, remarks, report)
        first = next(samples, None)  # a tar can't be empty
        shard = write_shard(self._dest, name, chain([first], samples)) if first else None
        return Record(shard=shard, skipped=skipped, remarks=remarks)

    def _samples(
        self,
        task: Task,
        skipped: list[Skipped],
        remarks: dict[str, tuple[int, str]],
        report: Report,
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
                example = printable(entry.name) + (f" ({detail})" if detail else "")
                count, first = remarks.get(kind, (0, example))
                remarks[kind] = count + 1, first
            components = {converted.component: converted.content}
            if self._job.has_labels:
                components[LABEL_COMPONENT] = str(entry.label).encode()
            others = {name: content for name, content in files.items() if name != entry.component}
            yield f"{number:08d}", components | others

    def _record(self, name: str) -> Record | None:
        """The record of a shard that is there and whole; None where there is no such."""
        if not self._notes.exists(name):
            return None
        try:
            record = Record.model_validate_json(self._notes.read(name))
            if record.shard is None or _is_whole(self._dest, record.shard):
                return record
        except (ValidationError, StorageError):
            pass
        return None


def refused(skipped: Sequence[Skipped]) -> DataError:
    """What is raised for samples that can't be packed, when strict."""
    return all_named(skipped, hint="Fix them, take them out, or leave out --strict")


def _is_whole(store: Store, shard: Shard) -> bool:
    """Whether a shard and its index have the digests that they were written with."""
    if store.size(shard.name) != shard.size:
        return False
    digest = hashlib.sha256()
    for start in range(0, shard.size, _HASHED_AT_ONCE_BYTES):
        stop = min(start + _HASHED_AT_ONCE_BYTES, shard.size)
        digest.update(store.read_ranges([(shard.name, start, stop)])[0])
    index = hashlib.sha256(store.read(shard.index)).hexdigest()
    return (digest.hexdigest(), index) == (shard.sha256, shard.index_sha256)
