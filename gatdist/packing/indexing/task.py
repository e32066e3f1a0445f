"""Index one shard.

Indexes for other readers of WebDataset shards:

* DALI's ``.idx``: a line ``v1.2 N``, then one line per sample: extension, offset, size and name of
  each file.
* Megatron-Energon's ``.tar.idx``: where each sample begins, and the last one ends, as little-endian
  64-bit numbers; and the folder ``.nv-meta``, which lists the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from isal.isal_zlib import crc32
from pydantic import BaseModel, ConfigDict, ValidationError

from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.formats import same_aspect
from gatdist.data.codecs.labels import read_label
from gatdist.data.format.manifest import Shard
from gatdist.data.format.shard_files import Row, encode_index
from gatdist.data.modalities import MODALITIES, components_of
from gatdist.packing.entries import Skipped
from gatdist.packing.indexing.probe import image_remarks, sample_shape
from gatdist.packing.indexing.scan import Member, Sample, Scan
from gatdist.packing.outcome import Remarks, add_remark
from gatdist.packing.processes import Report, ShardTask
from gatdist.packing.processes import Worker as BaseWorker
from gatdist.storage import Store

EXPORTS = ("dali", "energon")
# The state of an indexing; it may be deleted when the data set is complete.
NOTES = "indexing"
_REPORT_BYTES = 2**20
_MAX_SHAPES = 2
# Of records: increased if the same job gives another result.
_VERSION = 3


class Request(BaseModel):
    """What to index, and where; options as in :func:`gatdist.index`."""

    model_config = ConfigDict(frozen=True)

    source: str
    dest: str
    extension: str | None = None
    fields: dict[str, str] = {}
    labels: str | None = None
    num_tokens: int | None = None
    bits: int = 8
    exports: tuple[str, ...] = ()
    strict: bool = False
    options: dict[str, Any] = {}
    out_options: dict[str, Any] = {}


class Field(BaseModel):
    """What the files of one field are expected to be."""

    model_config = ConfigDict(frozen=True)

    name: str  # "" if it is the only one
    component: str | None  # as in FieldSpec
    modality: str
    facts: dict[str, Any]  # what all files must have in common


class Job(Request):
    """What all tasks share."""

    checked: tuple[Field, ...]  # that of the generated field is the first
    label: str | None  # as in SampleSpec; None without labels


@dataclass(frozen=True)
class Task(ShardTask):
    """One shard: its name in the folder, and its size in bytes."""

    name: str
    size: int


class Record(BaseModel):
    """The result of a task."""

    model_config = ConfigDict(frozen=True)

    settings: str  # a digest of the job
    shard: Shard | None = None  # None if no sample can be used, or the tar is damaged
    skipped: list[Skipped] = []  # samples that are not in the index
    ignored: list[Skipped] = []  # files of operating systems and tools
    unlabelled: list[str] = []  # keys of the samples in the index that have no label
    scattered: int = 0  # number of keys whose files are not adjacent
    shapes: list[list[list[int]]] = []  # different shapes of each field, two at most
    longest: list[int] = []  # the largest last dimension of all shapes of each field
    uneven: tuple[int, str] = (0, "")  # samples whose images differ in aspect ratio, and the first
    labels: list[int | str] = []
    num_keys: int = 0  # samples in the tar, skipped ones included
    remarks: Remarks = {}


class Worker(BaseWorker[Record]):
    """Indexes shards."""

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._job = job
        self._source = Store(job.source, job.options)
        self._dest = Store(job.dest, job.out_options)
        self._notes = self._dest.child(NOTES)
        names = {"source", "exports", "checked", "label"}
        settings = job.model_dump(mode="json", include=names) | {"version": _VERSION}
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def do(self, task: Task, report: Report) -> Record:
        """Index a shard, unless an earlier start has indexed it; progress is in bytes."""
        if record := self._record(task):
            report(0, task.size)
            return record
        scan = Scan(self._source, task.name)
        try:
            record = self._index(task, scan, report)
        except DataError as error:
            scan.report_rest(report)
            record = Record(settings=self._settings, skipped=[(task.name, str(error))])
        self._notes.publish(f"{task.name}.json", record.model_dump_json().encode())
        return record

    def _index(self, task: Task, scan: Scan, report: Report) -> Record:
        checks = _Checks(self._job)
        rows: list[Row] = []
        dali: list[str] = []
        for sample in scan.samples():
            try:
                rows += checks(sample)
                dali.append(_dali_line(sample))
            except CodecError as error:
                scan.skipped.append((f"{task.name}/{sample.key}", str(error)))
            scan.report(report, _REPORT_BYTES)
        scan.report(report)
        shard = None
        if rows:
            index = encode_index(rows)
            name = f"{task.name.removesuffix('.tar')}.index.npy"
            self._dest.publish(name, index)
            self._export(task.name, dali, scan.begins)
            shard = Shard(
                name=task.name,
                num_samples=len(dali),
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
            unlabelled=checks.unlabelled,
            scattered=len(scan.scattered),
            shapes=[[list(shape) for shape in shapes] for shapes in checks.shapes],
            longest=checks.longest,
            uneven=checks.uneven,
            labels=sorted(checks.labels, key=str),
            num_keys=len(scan.begins) - 1,
            remarks={kind: (n, f"{task.name}/{key}") for kind, (n, key) in checks.remarks.items()},
        )

    def _export(self, tar: str, dali: Sequence[str], begins: Sequence[int]) -> None:
        if "dali" in self._job.exports:
            text = "\n".join([f"v1.2 {len(dali)}", *dali])
            self._dest.publish(f"{tar.removesuffix('.tar')}.idx", f"{text}\n".encode())
        if "energon" in self._job.exports:
            self._dest.publish(f"{tar}.idx", np.array(begins, dtype="<u8").tobytes())

    def _record(self, task: Task) -> Record | None:
        """The record of an earlier start of the same job, if the shard has the same size."""
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


def _dali_line(sample: Sample) -> str:
    return " ".join(f"{m.component} {m.offset} {len(m.content)} {m.name}" for m in sample.members)


class _Checks:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._label_component, _, self._label_field = (job.label or "").partition(":")
        self.shapes: list[set[tuple[int, ...]]] = [set() for _ in job.checked]
        self.longest = [0] * len(job.checked)
        self.uneven = (0, "")
        self.labels: set[int | str] = set()
        self.unlabelled: list[str] = []
        self.remarks: Remarks = {}

    def __call__(self, sample: Sample) -> list[Row]:
        """Return the rows of a sample. Raises CodecError if it is not usable."""
        chosen = [_only(sample.members, field) for field in self._job.checked]
        shapes = list(map(_shape, chosen, self._job.checked))
        _require_one_length(shapes, self._job.checked)
        members = [*chosen]
        if self._job.label:
            file = next((m for m in sample.members if m.component == self._label_component), None)
            label = read_label(file.content, self._label_field) if file else None
            if file is None or label is None:
                self.unlabelled.append(sample.key)
            else:
                self.labels.add(label)
                members.append(file)
        self._look_at_images(sample.key, chosen, shapes)
        for i, shape in enumerate(shapes):
            if len(self.shapes[i]) < _MAX_SHAPES:
                self.shapes[i].add(shape)
            self.longest[i] = max(self.longest[i], shape[-1])
        key = sample.key.encode()
        return [
            (key, m.component.encode(), m.offset, len(m.content), crc32(m.content))
            for m in sorted(members, key=lambda member: member.offset)
        ]

    def _look_at_images(
        self, key: str, chosen: Sequence[Member], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        fields = self._job.checked
        images = [i for i, field in enumerate(fields) if field.modality == "image"]
        kinds = [kind for i in images for kind in image_remarks(chosen[i].content)]
        for kind in dict.fromkeys(kinds):
            add_remark(self.remarks, kind, key)
        sizes = [(shapes[i][1], shapes[i][2]) for i in images]
        if not all(same_aspect(sizes[0], size) for size in sizes):
            count, first = self.uneven
            self.uneven = count + 1, first or key


def _only(members: Sequence[Member], field: Field) -> Member:
    components = components_of(field.modality, field.component)
    found = [member for member in members if member.component in components]
    if len(found) != 1:
        has = ", ".join(f".{member.component}" for member in members)
        noun = MODALITIES[field.modality].noun
        if field.name:
            noun = f"file .{field.component} of the field {field.name}"
        raise CodecError(f"needs one {noun}, has {has}")
    return found[0]


def _shape(member: Member, field: Field) -> tuple[int, ...]:
    try:
        return sample_shape(member.content, field.modality, field.facts)
    except CodecError as error:
        raise CodecError(f"its {field.name} {error}" if field.name else str(error)) from error


def _require_one_length(shapes: Sequence[tuple[int, ...]], fields: Sequence[Field]) -> None:
    """Raise CodecError unless all audio of a sample is equally long, within a sample."""
    found = {
        field.name: shape[-1]
        for field, shape in zip(fields, shapes, strict=True)
        if field.modality == "audio"
    }
    if found and max(found.values()) - min(found.values()) > 1:
        lengths = ", ".join(f"{name} {length:,}" for name, length in found.items())
        raise CodecError(f"has audio that differs in length: {lengths} samples")


def write_energon_folder(dest: Store, shards: Sequence[Shard], num_keys: Sequence[int]) -> None:
    """Write ``.nv-meta``; ``num_keys`` of each shard as in its ``.tar.idx``."""
    names = [shard.name for shard in shards]
    counts = dict(zip(names, num_keys, strict=True))
    info = {"energon_version": "7.0.0", "shard_counts": counts}
    split = {"split_parts": {"train": names, "val": [], "test": []}, "exclude": []}
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    for name, values in ((".info.json", info), ("split.yaml", split), ("dataset.yaml", kind)):
        # JSON is YAML, too.
        dest.publish(f".nv-meta/{name}", json.dumps(values, indent=1).encode())
