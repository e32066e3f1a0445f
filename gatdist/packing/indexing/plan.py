"""Indexing as a whole: find the shards, probe them, and write the manifest."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import redact_url
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.audio import read_audio_header
from gatdist.data.codecs.labels import LABEL_COMPONENT
from gatdist.data.format.manifest import MANIFEST, SampleSpec, Shard, fits_manifest, write_manifest
from gatdist.data.format.shard_files import encode_index, read_index
from gatdist.data.modalities import MODALITIES, components_of
from gatdist.packing.convert import commonest
from gatdist.packing.entries import Skipped, all_named
from gatdist.packing.indexing.probe import sample_shape
from gatdist.packing.indexing.scan import Sample, Scan
from gatdist.packing.indexing.task import (
    EXPORTS,
    NOTES,
    Field,
    Job,
    Record,
    Request,
    Task,
    write_energon_folder,
)
from gatdist.packing.labels import UNLABELLED, numbering
from gatdist.packing.outcome import REPORT, outcome, varying, write_report
from gatdist.packing.sources.fields import belonging
from gatdist.packing.sources.files import system_file
from gatdist.storage import Store
from gatdist.storage.urls import OutsideUrl, without_credentials

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# Samples that are read to find what all have in common.
_PROBED = 64


@dataclass(frozen=True)
class Indexing:
    """A plan."""

    job: Job
    tasks: Sequence[Task]  # one per shard
    skipped: Sequence[Skipped]  # shards that can't be used
    labels: bool  # whether the user chose a source of labels


def prepare(request: Request) -> Indexing:
    """List the shards, and probe the first samples.

    Raises DataError if there is no shard, or none of their samples can be used.
    """
    for name in request.exports:
        if name not in EXPORTS:
            raise ConfigError("--export", f"must be {' or '.join(EXPORTS)}", value=name)
    if request.fields and request.extension:
        rule = "can't be used with --field"
        raise ConfigError("--extension", rule, value=request.extension)
    if request.bits not in (8, 16):
        raise ConfigError("--bits", "must be 8 or 16", value=request.bits)
    source = Store(request.source, request.options)
    dest = Store(request.dest, request.out_options)
    if dest.exists(MANIFEST) and not dest.exists(NOTES):
        hint = "Use it as it is, or choose another --out for another index"
        raise DataError(dest.url, f"has a {MANIFEST} already", hint=hint)
    sizes = {name: size for name, size in sorted(source.find().items()) if not system_file(name)}
    names = [name for name in sizes if name.lower().endswith(".tar")]
    packed = [name for name in sizes if name.lower().endswith(_COMPRESSED)]
    if packed and not names:
        rule = f"its shards are compressed, such as {packed[0]}"
        hint = f"Unpack them, such as: gzip -dk {packed[0]}"
        raise DataError(source.url, rule, hint=hint)
    if not names:
        hint = "Check the URL; pack images in folders with gatdist pack"
        raise DataError(source.url, "holds no shards (.tar)", hint=hint)
    skipped = [(name, "is compressed; unpack it, and index again") for name in packed]
    unfit = {name for name in names if not fits_manifest(name)}
    skipped += [(repr(name)[1:-1], "has control characters in its name") for name in sorted(unfit)]
    names = [name for name in names if name not in unfit]
    if not names:
        raise all_named(skipped, hint="Rename it")
    tasks = [
        Task(number, name, size if (size := sizes[name]) is not None else source.size(name))
        for number, name in enumerate(names)
    ]
    requested = request.labels not in (None, "none")
    return Indexing(_probe(request, source, tasks), tasks, skipped, requested)


def preview(indexing: Indexing) -> dict[str, Any]:
    """Return the plan as JSON values."""
    job = indexing.job
    return {
        "url": Store(job.dest).url,
        "source": Store(job.source).url,
        "modality": job.checked[0].modality,
        "fields": [field.name for field in job.checked],
        "label": f"{job.label} (if any)" if job.label and not indexing.labels else job.label,
        "shards": len(indexing.tasks),
        "bytes": sum(task.size for task in indexing.tasks),
    }


def finish(indexing: Indexing, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report and the manifest, given the records of all tasks in their order.

    Returns ``source``, ``shards_url`` (required value of ``data.shards_url``, or ""), and what
    :func:`~gatdist.packing.outcome.outcome` returns.

    Raises DataError if no sample can be used; or, if strict, one can't.
    """
    job = indexing.job
    dest = Store(job.dest, job.out_options)
    skipped = [*indexing.skipped, *(out for record in records for out in record.skipped)]
    ignored = [out for record in records for out in record.ignored]
    names, _, num_classes = numbering({label for record in records for label in record.labels})
    if indexing.labels and not num_classes and any(record.shard for record in records):
        rule = "no sample has a label there"
        raise DataError("--labels", rule, value=job.label, hint="Name another place, or none")
    used: list[tuple[Shard, Record]] = []
    for record in records:
        shard = record.shard
        if shard and num_classes and record.unlabelled:
            skipped += [(f"{shard.name}/{key}", UNLABELLED) for key in record.unlabelled]
            shard = _labelled(dest, shard, job)
        if shard:
            used.append((shard, record))
    write_report(dest, skipped, ignored, strict=job.strict)
    if not used:
        raise _unusable(indexing, records, skipped)
    shards = [shard for shard, _ in used]
    spec = _spec(job, [record for _, record in used], names, num_classes)
    _require_one_aspect(spec, used)
    is_beside = job.source.rstrip("/") == job.dest.rstrip("/")
    elsewhere = None if is_beside else without_credentials(job.source)
    write_manifest(dest, shards, spec, shards_url=elsewhere)
    if "energon" in job.exports:
        write_energon_folder(dest, shards, [record.num_keys for _, record in used])
    remarks = [record.remarks for _, record in used]
    if spec.bits == 16:  # nothing is lost
        remarks = [{k: n for k, n in each.items() if k != "reduced"} for each in remarks]
    return {
        "source": Store(job.source).url,
        **outcome(dest, spec, shards, skipped, ignored, remarks),
        "shards_url": elsewhere if elsewhere and not _is_reachable(dest, elsewhere) else "",
    }


def _require_one_aspect(spec: SampleSpec, used: Sequence[tuple[Shard, Record]]) -> None:
    """Raise DataError if images must be cropped as they are read, and those of a sample can't."""
    count = sum(record.uneven[0] for _, record in used)
    if count and "image" in varying(spec):
        first = next(f"{s.name}/{record.uneven[1]}" for s, record in used if record.uneven[0])
        rule = f"images differ in size, and {count:,} samples have images of different aspect "
        rule += f"ratios, such as {first}"
        raise DataError("--field", rule, hint="Pack them with --size and --transform stretch")


def _is_reachable(dest: Store, shards_url: str) -> bool:
    try:
        dest.reach(OutsideUrl(shards_url))
    except ValueError:
        return False
    return True


def _probe(request: Request, source: Store, tasks: Sequence[Task]) -> Job:
    reason, hint = "they are empty", "Name the extension of the samples' files: --extension jpg"
    scattered = False
    damaged: list[Skipped] = []
    for task in tasks:
        scan = Scan(source, task.name)
        scanned = scan.samples()
        try:
            samples = list(islice(scanned, _PROBED))
        except DataError as error:
            damaged.append((str(error), ""))
            continue
        if not samples:
            if scan.skipped:
                name, why = scan.skipped[0]
                reason, hint = f"{name} {why}", "Rename the files in its tars"
            continue
        found = Counter(member.component for sample in samples for member in sample.members)
        modalities = _modalities(request, found)
        if modalities is None:
            reason = f"{task.name} holds " + ", ".join(f".{name}" for name in found)
            if "tar" in found:
                hint = "Unpack the tars inside it first"
            with suppress(DataError):
                deque(scanned, maxlen=0)  # finds all scattered keys
            scattered = scattered or bool(scan.scattered)
            continue
        checked = _fields(request, modalities, samples)
        if checked is None:
            reason = f"those of {task.name} are unreadable"
            continue
        if request.bits != 8 and "image" not in modalities:
            rule = f"the shards hold {', '.join(modalities)}, not images"
            raise ConfigError("--bits", rule, value=16)
        label = None if request.labels == "none" else request.labels or LABEL_COMPONENT
        return Job(**request.model_dump(), checked=checked, label=label)
    if scattered:
        raise _not_adjacent(source.url)
    if damaged and len(damaged) == len(tasks):
        raise all_named(damaged)
    raise DataError(source.url, f"none of its samples can be used ({reason})", hint=hint)


def _not_adjacent(url: str) -> DataError:
    rule = "the files of a key must be adjacent in the tar"
    hint = "Sort the tar: tar xf X.tar -C FOLDER, and tar cf X.tar --sort=name -C FOLDER ."
    return DataError(url, rule, hint=f"{hint} Or pack it again with gatdist pack")


def _unusable(
    indexing: Indexing, records: Sequence[Record], skipped: Sequence[Skipped]
) -> DataError:
    source, dest = redact_url(indexing.job.source), redact_url(indexing.job.dest)
    if any(record.scattered for record in records):
        return _not_adjacent(source)
    if len(skipped) == len(indexing.tasks):  # each tar is damaged
        return all_named([(reason, "") for _, reason in skipped])
    name, reason = skipped[0]
    rule = f"none of its samples can be used ({name} {reason})"
    return DataError(source, rule, hint=f"See {dest}/{REPORT}")


def _labelled(dest: Store, shard: Shard, job: Job) -> Shard | None:
    """The shard with an index of its labelled samples only; None without any."""
    component = (job.label or "").partition(":")[0].encode()
    index = read_index(dest, shard)
    keys = index["key"][index["component"] == component]
    if not len(keys):
        return None
    content = encode_index(index[np.isin(index["key"], keys)].tolist())
    name = f"{shard.name.removesuffix('.tar')}.labelled.index.npy"
    dest.publish(name, content)
    digest = hashlib.sha256(content).hexdigest()
    changes = {"index": name, "index_sha256": digest, "num_samples": len(keys)}
    return shard.model_copy(update=changes)


def _modalities(request: Request, found: Counter[str]) -> list[str] | None:
    """The modality of each field, None if a field has no file among those ``found``."""
    # Points are .npy files too; only --tokens distinguishes them from tokens.
    known = ("image", "audio", "text", "tokens" if request.num_tokens else "points")
    chosen = request.fields or ({"": request.extension} if request.extension else {})
    option = "--field" if request.fields else "--extension"
    modalities = []
    for where in chosen.values():
        files = belonging(where, found)
        endings = {file.rpartition(".")[2] for file in files or [where]} - {"*"}
        fitting = [name for name in known if endings and endings <= {*MODALITIES[name].components}]
        if endings and not fitting:
            named = sorted({c for name in known for c in MODALITIES[name].components})
            raise ConfigError(option, f"must end in one of {', '.join(named)}", value=where)
        if not files:
            return None
        modalities += fitting
    if chosen:
        return modalities
    counts = {name: sum(found[c] for c in MODALITIES[name].components) for name in known}
    # Texts next to images and audio are captions.
    best = max((name for name in known if name != "text"), key=lambda name: counts[name])
    best = best if counts[best] else "text"
    return [best] if counts[best] else None


def _fields(
    request: Request, modalities: Sequence[str], samples: Sequence[Sample]
) -> tuple[Field, ...] | None:
    """What the files of each field have in common; None if those of one are unreadable."""
    fields = []
    chosen: Mapping[str, str | None] = request.fields or {"": request.extension}
    for (name, component), modality in zip(chosen.items(), modalities, strict=True):
        components = components_of(modality, component)
        contents = [m.content for s in samples for m in s.members if m.component in components]
        facts = _facts(request, modality, contents)
        if facts is None:
            return None
        fields.append(Field(name=name, component=component, modality=modality, facts=facts))
    rates = {f.name: f.facts["sample_rate"] for f in fields if f.modality == "audio"}
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{name} {rate:,} Hz" for name, rate in rates.items())
        hint = "Pack them with --sample-rate HZ"
        raise DataError("--field", f"the fields differ in sample rate: {found}", hint=hint)
    return tuple(fields)


def _facts(request: Request, modality: str, contents: Sequence[bytes]) -> dict[str, Any] | None:
    common: dict[str, Any] = {}
    if request.bits != 8 and modality == "image":
        common["bits"] = request.bits
    if modality == "tokens":
        common["num_tokens"] = request.num_tokens
    shapes, rates = [], []
    for content in contents:
        with suppress(CodecError):
            shapes.append(sample_shape(content, modality, common))
            if modality == "audio":
                rates.append(read_audio_header(content).sample_rate)
    if not shapes:
        return None
    if modality == "audio":
        common |= {"sample_rate": commonest(rates), "channels": commonest([s[0] for s in shapes])}
    elif modality == "points":
        common["sample_shape"] = list(commonest(shapes))
    return common


def _spec(
    job: Job, records: Sequence[Record], names: Sequence[str] | None, num_classes: int
) -> SampleSpec:
    own, *others = [_field_spec(i, field, records) for i, field in enumerate(job.checked)]
    further = dict(zip([field.name for field in job.checked[1:]], others, strict=True))
    return SampleSpec.model_validate(
        {
            **own,
            "fields": further or None,
            "num_classes": num_classes,
            "class_names": names,
            "label": job.label if job.label and num_classes else LABEL_COMPONENT,
            "named_labels": names is not None,
        }
    )


def _field_spec(i: int, field: Field, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "modality": field.modality,
        "sample_shape": _common_shape(i, field, records),
        "component": field.component,
        "bits": field.facts.get("bits", 8),
        "sample_rate": field.facts.get("sample_rate"),
        "num_tokens": field.facts.get("num_tokens"),
    }


def _common_shape(i: int, field: Field, records: Sequence[Record]) -> list[int | None]:
    shapes = {tuple(shape) for record in records for shape in record.shapes[i]}
    if field.modality == "image":
        channels = 1 if all(shape[0] == 1 for shape in shapes) else 3
        sizes = {shape[1:] for shape in shapes}
        return [channels, *(sizes.pop() if len(sizes) == 1 else (None, None))]
    if field.modality == "text":
        return [max(record.longest[i] for record in records)]
    if len(shapes) == 1:
        return list(shapes.pop())
    (*rest, _) = next(iter(shapes))
    return [*rest, None]
