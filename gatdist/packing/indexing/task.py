"""Makes the index of one shard; done again, it finds it there and leaves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Self

from isal.isal_zlib import crc32
from pydantic import BaseModel, ConfigDict, ValidationError

from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs import CodecError, read_label
from gatdist.data.format import Shard, encode_index
from gatdist.data.format.shard_files import Row
from gatdist.data.modalities import MODALITIES
from gatdist.packing.entries import Skipped
from gatdist.packing.indexing import exports
from gatdist.packing.indexing.probe import image_remarks, sample_shape
from gatdist.packing.indexing.scan import Member, Sample, Scan
from gatdist.packing.processes import Report
from gatdist.storage import Store

# What a rerun needs to know; the folder may be deleted when a data set is whole.
NOTES = "indexing"
_REPORT_BYTES = 2**20
_MOST_SHAPES = 2
# Of records: raised where the same job would find something else than it did before.
_VERSION = 2


class Job(BaseModel):
    """What all tasks of an indexing share, as JSON can carry it.

    Attributes:
        source: URL of the shards.
        dest: URL of the indexes and the manifest.
        options: of the source's storage.
        out_options: of the destination's storage.
        modality: of the samples.
        component: the ending of each sample's file; None for any that the modality has.
        label: see :class:`~gatdist.data.format.SampleSpec`; None where there are no labels.
        facts: what all samples must have in common.
        exports: other indexes to write, ``dali`` and ``energon``.
        strict: samples that can't be used are an error, when all are known.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    dest: str
    options: dict[str, Any]
    out_options: dict[str, Any]
    modality: str
    component: str | None
    label: str | None
    facts: dict[str, Any]
    exports: list[str]
    strict: bool


@dataclass(frozen=True)
class Task:
    """One shard.

    Attributes:
        number: of the shard.
        name: in its folder.
        size: in bytes.
    """

    number: int
    name: str
    size: int

    def to_json(self) -> str:
        """As JSON, for another process."""
        return json.dumps(astuple(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote."""
        return cls(*json.loads(text))


class Record(BaseModel):
    """What became of a task.

    Attributes:
        settings: a digest of the job that it was made for.
        shard: as the manifest tells it; None where no sample can be used, or the tar is damaged.
        skipped: name and reason of each sample that is not in the index.
        ignored: name and reason of files of operating systems and tools.
        unlabelled: keys of the samples in the index that have no label.
        scattered: how many keys have files that are not adjacent.
        shapes: different shapes of samples, two at most.
        longest: the largest last number of all shapes.
        labels: different labels.
        num_keys: samples in the tar, those left out too.
        remarks: of each of ``REMARKS`` that came up, how many samples, and the first.
    """

    model_config = ConfigDict(frozen=True)

    settings: str
    shard: Shard | None = None
    skipped: list[Skipped] = []
    ignored: list[Skipped] = []
    unlabelled: list[str] = []
    scattered: int = 0
    shapes: list[list[int]] = []
    longest: int = 0
    labels: list[int | str] = []
    num_keys: int = 0
    remarks: dict[str, tuple[int, str]] = {}


class Worker:
    """Does tasks of one job.

    Args:
        job: what all tasks share.
    """

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._job = job
        self._source = Store(job.source, job.options)
        self._dest = Store(job.dest, job.out_options)
        self._notes = self._dest.child(NOTES)
        message = job.model_dump(exclude={"dest", "options", "out_options", "strict"})
        message |= {"version": _VERSION}
        self._settings = hashlib.sha256(json.dumps(message).encode()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def do(self, task: Task, report: Report) -> Record:
        """Index a shard, or find that it was indexed already. Progress is told in bytes.

        Raises:
            StorageError: it can't be read, or nothing be written to the destination.
        """
        record = self._record(task)
        if record is None:
            scan = Scan(self._source, task.name)
            try:
                record = self._index(task, scan, report)
            except DataError as error:
                scan.report_rest(report)
                skipped = [(task.name, str(error))]
                record = Record(settings=self._settings, skipped=skipped)
            self._notes.publish(f"{task.name}.json", record.model_dump_json().encode())
        else:
            report(0, task.size)
        return record

    def _index(self, task: Task, scan: Scan, report: Report) -> Record:
        look = Look(self._job)
        export = exports.Exports(self._job.exports)
        rows: list[Row] = []
        num_samples = 0
        for sample in scan.samples():
            try:
                rows += look(sample)
                num_samples += 1
                export.add(sample)
            except CodecError as error:
                scan.skipped.append((f"{task.name}/{sample.key}", str(error)))
            scan.report(report, _REPORT_BYTES)
        scan.report(report)
        shard = None
        if rows:
            index = encode_index(rows)
            name = f"{task.name.removesuffix('.tar')}.index.npy"
            self._dest.publish(name, index)
            export.write(self._dest, task.name, scan.begins)
            shard = Shard(
                name=task.name,
                num_samples=num_samples,
                size=scan.size,
                sha256=scan.sha256,
                index=name,
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        return Record(
            settings=self._settings,
            shard=shard,
            skipped=scan.skipped,
            ignored=scan.ignored,
            unlabelled=look.unlabelled,
            scattered=len(scan.scattered),
            shapes=[list(shape) for shape in look.shapes],
            longest=look.longest,
            labels=sorted(look.labels, key=str),
            num_keys=len(scan.begins) - 1,
            remarks={kind: (n, f"{task.name}/{key}") for kind, (n, key) in look.remarks.items()},
        )

    def _record(self, task: Task) -> Record | None:
        """The record of a shard that was indexed for such a job, and has not changed in size."""
        name = f"{task.name}.json"
        if not self._notes.exists(name):
            return None
        try:
            record = Record.model_validate_json(self._notes.read(name))
            shard = record.shard
            if record.settings != self._settings or (shard and shard.size != task.size):
                return None
            if shard is None:
                return record
            index = hashlib.sha256(self._dest.read(shard.index)).hexdigest()
            return record if index == shard.index_sha256 else None
        except (ValidationError, StorageError):
            return None


class Look:
    """Checks samples, one after the other, and notes what they have in common.

    Args:
        job: what they should be.

    Attributes:
        shapes: the first different ones, two at most.
        longest: the largest last number of all shapes.
        labels: all different ones.
        remarks: of each kind, how many samples, and the key of the first.
        unlabelled: keys of the samples without a label.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._components = (
            (job.component,) if job.component else MODALITIES[job.modality].components
        )
        self._label_component, _, self._label_field = (job.label or "").partition(":")
        self.shapes: set[tuple[int, ...]] = set()
        self.longest = 0
        self.labels: set[int | str] = set()
        self.unlabelled: list[str] = []
        self.remarks: dict[str, tuple[int, str]] = {}

    def __call__(self, sample: Sample) -> list[Row]:
        """The rows of a sample. Raises CodecError if it is not what it should be."""
        chosen = _only(sample.members, self._components, MODALITIES[self._job.modality].noun)
        shape = sample_shape(chosen.content, self._job.modality, self._job.facts)
        members = [chosen]
        if self._job.label:
            file = next((m for m in sample.members if m.component == self._label_component), None)
            label = read_label(file.content, self._label_field) if file else None
            if file is None or label is None:
                self.unlabelled.append(sample.key)
            else:
                self.labels.add(label)
                members.append(file)
        if self._job.modality == "image":
            for kind in image_remarks(chosen.content):
                count, first = self.remarks.get(kind, (0, sample.key))
                self.remarks[kind] = count + 1, first
        if len(self.shapes) < _MOST_SHAPES:
            self.shapes.add(shape)
        self.longest = max(self.longest, shape[-1])
        key = sample.key.encode()
        return [
            (key, m.component.encode(), m.offset, len(m.content), crc32(m.content))
            for m in sorted(members, key=lambda member: member.offset)
        ]


def _only(members: Sequence[Member], components: Iterable[str], noun: str) -> Member:
    found = [member for member in members if member.component in components]
    if len(found) != 1:
        has = ", ".join(f".{member.component}" for member in members)
        raise CodecError(f"needs one {noun}, has {has}")
    return found[0]
