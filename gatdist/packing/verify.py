"""Check every byte of a data set against its manifest and indexes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from isal.isal_zlib import crc32
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gatdist.common.errors import DataError, StorageError
from gatdist.common.strict_json import parse_json
from gatdist.config import DataConfig
from gatdist.data.codecs import CodecError
from gatdist.data.format.manifest import Shard, open_shards, read_manifest
from gatdist.data.format.shard_files import read_index, trailing_data
from gatdist.data.modalities import decoders_of, new_samples, read_spec, resizing
from gatdist.data.reading.shards import OpenShard
from gatdist.packing.indexing.probe import sample_shape
from gatdist.packing.indexing.scan import Scan
from gatdist.packing.outcome import REPORT
from gatdist.packing.processes import Report, ShardTask
from gatdist.packing.processes import Worker as BaseWorker
from gatdist.packing.sources.files import split
from gatdist.storage import Store

_REPORT_BYTES = 2**20
_MAX_NAMED = 10
# For samples that differ in size.
_ANY_RESOLUTION = 64


class Job(BaseModel):
    """What all tasks share."""

    model_config = ConfigDict(frozen=True)

    url: str
    options: dict[str, Any]
    shards_url: str  # the user's own, "" for the manifest's
    shards_options: dict[str, Any]
    decode: bool  # also decode each sample


Task = ShardTask


class Record(BaseModel):
    """Pairs of a damaged file and the problem."""

    model_config = ConfigDict(frozen=True)

    damaged: list[tuple[str, str]] = []


class Worker(BaseWorker[Record]):
    """Verifies shards. Raises DataError if the manifest is damaged."""

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._indexes = Store(job.url, job.options)
        self._manifest = read_manifest(self._indexes)
        given = DataConfig(
            url=job.url,
            storage_options=job.options,
            shards_url=job.shards_url,
            shards_storage_options=job.shards_options,
        )
        fix = "Use --shards-url URL, and --shards-option KEY=VALUE if they need credentials"
        self._tars = open_shards(self._indexes, self._manifest, given, fix=fix)
        self._decodes = job.decode

    def do(self, task: Task, report: Report) -> Record:
        """Verify a shard; progress is in bytes."""
        shard = self._manifest.shards[task.number]
        damaged: list[tuple[str, str]] = []
        try:
            self._verify(shard, damaged, report)
        except DataError as error:
            damaged.append((f"{self._tars.url}/{shard.name}", str(error)))
        except StorageError as error:
            damaged.append((f"{self._tars.url}/{shard.name}", f"can't be read ({error})"))
        return Record(damaged=damaged)

    def _verify(self, shard: Shard, damaged: list[tuple[str, str]], report: Report) -> None:
        url = f"{self._tars.url}/{shard.name}"
        size = self._tars.size(shard.name)
        if size != shard.size:
            report(shard.size, 0)
            damaged.append((url, f"has {size:,} bytes, the manifest says {shard.size:,}"))
            return
        scan = Scan(self._tars, shard.name)
        files: dict[int, tuple[str, int]] = {}  # name and size, by the byte where it begins
        problem = ""
        try:
            for member in scan.members():
                files[member.offset] = f"{member.key}.{member.component}", len(member.content)
                scan.report(report, _REPORT_BYTES)
        except DataError as error:
            problem = str(error)
            scan.drain()
        scan.report(report)
        if scan.trailing is not None:
            damaged.append((url, trailing_data(scan.trailing)))
        if scan.sha256 != shard.sha256:
            said = f"the manifest says {shard.sha256}"
            damaged.append((url, f"has SHA-256 {scan.sha256}, {said}"))
        elif problem:
            damaged.append((url, problem))
        index = read_index(self._indexes, shard)
        if scan.sha256 != shard.sha256:
            self._find_files(shard, index, damaged)
        elif not problem:
            self._compare(shard, index, files, damaged)
        if self._decodes:
            self._decode(shard, damaged)

    def _compare(
        self,
        shard: Shard,
        index: NDArray[Any],
        files: Mapping[int, tuple[str, int]],
        damaged: list[tuple[str, str]],
    ) -> None:
        """Find differences between index and tar, and samples missing from the index."""
        url = f"{self._tars.url}/{shard.name}"
        rows = index.tolist()
        wrong = []
        for key, component, offset, size, _ in rows:
            name = f"{key.decode()}.{component.decode()}"
            if files.get(offset) != (name, size):
                wrong.append(f"{name} is not at byte {offset} with {size} bytes")
        damaged += [(f"{url}: index", problem) for problem in wrong[:_MAX_NAMED]]
        if len(wrong) > _MAX_NAMED:
            damaged.append((f"{url}: index", f"and {len(wrong) - _MAX_NAMED:,} more"))
        known = {key.decode() for key, *_ in rows} | self._reported(shard)
        keys = {split(name)[0] for name, _ in files.values()}
        if lost := {key for key in keys if key not in known}:
            what = f"{len(lost):,} samples that neither the index nor {REPORT} names"
            damaged.append((url, f"has {what}, such as {min(lost)}; index it again"))

    def _reported(self, shard: Shard) -> set[str]:
        report, names = self._indexes.read_if_exists(REPORT) or b"", set()
        for line in report.decode(errors="replace").splitlines():
            try:
                name = str(parse_json(line)["source"])
            except (ValueError, LookupError, TypeError):
                continue
            if name.startswith(f"{shard.name}/"):
                name = name[len(shard.name) + 1 :]
                names |= {name, split(name)[0]}
        return names

    def _find_files(self, shard: Shard, index: Any, damaged: list[tuple[str, str]]) -> None:
        for row in index:
            begin, end = int(row["offset"]), int(row["offset"] + row["size"])
            (content,) = self._tars.read_ranges([(shard.name, begin, end)])
            found = crc32(content)
            if found != row["crc32"]:
                name = f"{row['key'].decode()}.{row['component'].decode()}"
                what = f"at byte {begin} has CRC-32 {found:08x}, expected {row['crc32']:08x}"
                damaged.append((f"{self._tars.url}/{shard.name}: {name}", what))

    def _decode(self, shard: Shard, damaged: list[tuple[str, str]]) -> None:
        manifest = self._manifest
        fields = [manifest, *(manifest.fields or {}).values()]
        size: dict[str, Any] = {"url": self._indexes.url}
        for field in fields:
            if None in field.sample_shape:
                is_image = field.modality == "image"
                size |= {"resolution": _ANY_RESOLUTION} if is_image else {"length": 1}
        config = DataConfig.model_validate(size)
        spec = read_spec(manifest, config, self._indexes.url)
        decode = decoders_of(spec, resizing(manifest, config, spec))
        opened = OpenShard(self._tars, self._indexes, manifest, shard, decode)
        out = new_samples(spec, 1)[0]
        checks = [
            partial(
                sample_shape,
                modality=field.modality,
                common={"num_tokens": field.num_tokens},
                whole=True,
            )
            for field in fields
        ]
        for i in range(shard.num_samples):
            begin, end = opened.span(i, i + 1)
            (data,) = self._tars.read_ranges([(shard.name, begin, end)])
            try:
                opened.decode_into(i, begin, data, out)
                # The above decodes a sample only as far as a run needs it.
                opened.check(i, begin, data, checks)
            except CodecError as error:
                damaged.append((f"{self._tars.url}/{shard.name}:", str(error)))
