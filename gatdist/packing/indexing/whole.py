"""Indexing as a whole: which shards, what they hold, and at last the manifest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import redact_url
from gatdist.data.codecs import LABEL_COMPONENT, CodecError, read_audio_header
from gatdist.data.format import (
    MANIFEST,
    SampleSpec,
    Shard,
    encode_index,
    fits_manifest,
    read_index,
    write_manifest,
)
from gatdist.data.modalities import MODALITIES
from gatdist.packing.converted import counted
from gatdist.packing.entries import Skipped, all_named
from gatdist.packing.indexing import exports
from gatdist.packing.indexing.probe import sample_shape
from gatdist.packing.indexing.scan import Sample, Scan
from gatdist.packing.indexing.task import NOTES, Job, Record, Task
from gatdist.packing.labels import UNLABELLED, numbering
from gatdist.packing.sources.names import system_file
from gatdist.storage import OutsideUrl, Store, without_credentials

REPORT = "report.jsonl"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# So many samples are looked at to see what they are.
_LOOKED_AT = 64
_EXAMPLES = 3
# With .npy, --tokens makes the difference.
_RECOGNIZED = ("image", "audio", "points", "text")


@dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        source: URL of the folder of the shards.
        dest: URL of the folder for the indexes and the manifest; may be the same.
        extension: of each sample's file; None detects it.
        labels: an ending, ``json:FIELD``, or ``none``; None takes ``cls`` where it is there.
        num_tokens: ``.npy`` files hold tokens of a vocabulary of this size; None: points.
        bits: of each channel of images as they are read, 8 or 16.
        exports: of ``exports.NAMES``.
        strict: a sample that can't be used is an error.
        options: of the source's storage.
        out_options: of the destination's storage.
    """

    source: str
    dest: str
    extension: str | None = None
    labels: str | None = None
    num_tokens: int | None = None
    bits: int = 8
    exports: Sequence[str] = ()
    strict: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    out_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Indexing:
    """A plan, ready to be carried out.

    Attributes:
        job: what all tasks share.
        tasks: one a shard.
        skipped: shards that can't be used.
        labels: whether the user said where labels are.
    """

    job: Job
    tasks: Sequence[Task]
    skipped: Sequence[Skipped]
    labels: bool


def prepare(request: Request) -> Indexing:
    """List the shards, and look at the first samples.

    Raises:
        ConfigError: an option makes no sense.
        DataError: there is no shard, or none of their samples can be used.
        StorageError: a URL can't be used.
    """
    for name in request.exports:
        if name not in exports.NAMES:
            raise ConfigError("--export", f"must be {' or '.join(exports.NAMES)}", value=name)
    if request.bits not in (8, 16):
        raise ConfigError("--bits", "must be 8 or 16", value=request.bits)
    source = Store(request.source, request.options)
    dest = Store(request.dest, request.out_options)
    if dest.exists(MANIFEST) and not dest.exists(NOTES):
        hint = "It can be used as it is; to make another index of it, choose another --out"
        raise DataError(dest.url, f"has a {MANIFEST} already", hint=hint)
    sizes = {name: size for name, size in sorted(source.find().items()) if not system_file(name)}
    names = [name for name in sizes if name.lower().endswith(".tar")]
    packed = [name for name in sizes if name.lower().endswith(_COMPRESSED)]
    if not names:
        _raise_no_shards(source, packed)
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
    return Indexing(_look(request, source, tasks), tasks, skipped, requested)


def preview(indexing: Indexing) -> dict[str, Any]:
    """What is planned, as JSON values."""
    job = indexing.job
    return {
        "url": Store(job.dest).url,
        "source": Store(job.source).url,
        "modality": job.modality,
        "label": f"{job.label} (if any)" if job.label and not indexing.labels else job.label,
        "shards": len(indexing.tasks),
        "bytes": sum(task.size for task in indexing.tasks),
    }


def finish(indexing: Indexing, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report and the manifest, and tell what there is.

    Args:
        indexing: the plan.
        records: what became of its tasks, in their order.

    Returns:
        ``url, source, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        skipped_examples``, ``report`` (a name, None without one) and ``shards_url`` (what
        ``data.shards_url`` must be set to; "" where it need not be set); of each of
        :data:`~gatdist.packing.converted.REMARKS`, such as ``transparent``, how many samples,
        and under ``transparent_example`` the first.

    Raises:
        DataError: no sample can be used; or strict, and some can't.
        StorageError: nothing can be written to the destination.
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
    if skipped or ignored:
        reported = [*skipped, *ignored]
        lines = (json.dumps({"source": name, "reason": why}) for name, why in reported)
        dest.publish(REPORT, "".join(f"{line}\n" for line in lines).encode())
    if job.strict and skipped:
        raise all_named(skipped, hint="Fix them, take them out, or leave out --strict")
    if not used:
        raise _unusable(indexing, records, skipped)
    shards = [shard for shard, _ in used]
    spec = _spec(job, [record for _, record in used], names, num_classes)
    is_beside = job.source.rstrip("/") == job.dest.rstrip("/")
    elsewhere = None if is_beside else without_credentials(job.source)
    write_manifest(dest, shards, spec, shards_url=elsewhere)
    if "energon" in job.exports:
        exports.write_energon_folder(dest, shards, [record.num_keys for _, record in used])
    return {
        "url": dest.url,
        "source": Store(job.source).url,
        "modality": spec.modality,
        "sample_shape": list(spec.sample_shape),
        "num_classes": spec.num_classes,
        "shards": len(shards),
        "samples": sum(shard.num_samples for shard in shards),
        "bytes": sum(shard.size for shard in shards),
        "skipped": len(skipped),
        "skipped_examples": [list(out) for out in skipped[:_EXAMPLES]],
        **_remarks(job, [record for _, record in used]),
        "ignored": len(ignored),
        "report": REPORT if skipped or ignored else None,
        "shards_url": elsewhere if elsewhere and not _is_reached(dest, elsewhere) else "",
    }


def _is_reached(dest: Store, shards_url: str) -> bool:
    """Whether the manifest alone may name the folder of the shards."""
    try:
        dest.reach(OutsideUrl(shards_url))
    except ValueError:
        return False
    return True


def _remarks(job: Job, records: Sequence[Record]) -> dict[str, Any]:
    found = [record.remarks for record in records]
    if job.facts.get("bits") == 16:  # nothing is lost
        found = [{k: n for k, n in remarks.items() if k != "reduced"} for remarks in found]
    return counted(found)


def _look(request: Request, source: Store, tasks: Sequence[Task]) -> Job:
    """What the first samples that can be read have in common."""
    reason = "they are empty"
    scattered = nested = is_named = False
    damaged: list[Skipped] = []
    for task in tasks:
        scan = Scan(source, task.name)
        found_samples = scan.samples()
        try:
            samples = list(islice(found_samples, _LOOKED_AT))
        except DataError as error:
            damaged.append((str(error), ""))
            continue
        if not samples:
            for name, why in scan.skipped[:1]:
                reason = f"{name} {why}"
                is_named = True
            continue
        found = Counter(member.component for sample in samples for member in sample.members)
        modality = _modality(request, found)
        if modality is None:
            reason = f"{task.name} holds " + ", ".join(f".{name}" for name in found)
            nested = nested or "tar" in found
            with suppress(DataError):
                deque(found_samples, maxlen=0)
            scattered = scattered or bool(scan.scattered)
            continue
        facts = _facts(request, modality, samples)
        if facts is None:
            reason = f"those of {task.name} are unreadable"
            continue
        if request.bits != 8 and modality != "image":
            raise ConfigError("--bits", f"the shards hold {modality}, not images", value=16)
        return Job(
            source=request.source,
            dest=request.dest,
            options=dict(request.options),
            out_options=dict(request.out_options),
            modality=modality,
            component=request.extension,
            label=None if request.labels == "none" else request.labels or LABEL_COMPONENT,
            facts=facts,
            exports=sorted(request.exports),
            strict=request.strict,
        )
    if scattered:
        raise _not_adjacent(source.url)
    if damaged and len(damaged) == len(tasks):
        raise all_named(damaged)
    rule = f"none of its samples can be used ({reason})"
    hint = "Name the ending of the samples' files: --extension jpg"
    if nested:
        hint = "Unpack the tars inside it first"
    elif is_named:
        hint = "Name the files in its tars otherwise"
    raise DataError(source.url, rule, hint=hint)


def _not_adjacent(url: str) -> DataError:
    rule = "the files of a key must be adjacent in the tar, and they are not"
    hint = "Sort the tar: tar xf X.tar -C FOLDER, and tar cf X.tar --sort=name -C FOLDER ."
    return DataError(url, rule, hint=f"{hint} Or write it anew with gatdist pack")


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
    """A shard with an index of those samples only that have a label; None where none has."""
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


def _modality(request: Request, found: Counter[str]) -> str | None:
    """What most of the samples have files of."""
    tokens = ("tokens",) if request.num_tokens else ("points",)
    known = [name for name in _RECOGNIZED if name != "points"] + list(tokens)
    if request.extension:
        fitting = [name for name in known if request.extension in MODALITIES[name].components]
        if not fitting:
            endings = sorted({c for name in known for c in MODALITIES[name].components})
            rule = f"must be one of {', '.join(endings)}"
            raise ConfigError("--extension", rule, value=request.extension)
        return fitting[0] if request.extension in found else None
    counts = {name: sum(found[c] for c in MODALITIES[name].components) for name in known}
    # Captions stand beside pictures and sounds, so texts are what is left.
    best = max((name for name in known if name != "text"), key=lambda name: counts[name])
    best = best if counts[best] else "text"
    return best if counts[best] else None


def _facts(request: Request, modality: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What all samples must have in common; None where none of these can be read."""
    common: dict[str, Any] = {"bits": request.bits} if request.bits != 8 else {}
    if modality == "tokens":
        common["num_tokens"] = request.num_tokens
    components = (request.extension,) if request.extension else MODALITIES[modality].components
    contents = [m.content for s in samples for m in s.members if m.component in components]
    shapes, rates = [], []
    for content in contents:
        with suppress(CodecError):
            shapes.append(sample_shape(content, modality, common))
            if modality == "audio":
                rates.append(read_audio_header(content).sample_rate)
    if not shapes:
        return None
    if modality == "audio":
        common |= {"sample_rate": _commonest(rates), "channels": _commonest([s[0] for s in shapes])}
    elif modality == "points":
        common["sample_shape"] = list(_commonest(shapes))
    return common


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _spec(
    job: Job, records: Sequence[Record], names: Sequence[str] | None, num_classes: int
) -> SampleSpec:
    facts = job.facts
    return SampleSpec.model_validate(
        {
            "modality": job.modality,
            "sample_shape": _common_shape(job, records),
            "component": job.component,
            "bits": facts.get("bits", 8),
            "sample_rate": facts.get("sample_rate"),
            "num_tokens": facts.get("num_tokens"),
            "num_classes": num_classes,
            "class_names": names,
            "label": job.label if job.label and num_classes else LABEL_COMPONENT,
            "named_labels": names is not None,
        }
    )


def _common_shape(job: Job, records: Sequence[Record]) -> list[int | None]:
    shapes = {tuple(shape) for record in records for shape in record.shapes}
    if job.modality == "image":
        channels = 1 if all(shape[0] == 1 for shape in shapes) else 3
        sizes = {shape[1:] for shape in shapes}
        return [channels, *(sizes.pop() if len(sizes) == 1 else (None, None))]
    if job.modality == "text":
        return [max(record.longest for record in records)]
    if len(shapes) == 1:
        return list(shapes.pop())
    (*rest, _) = next(iter(shapes))
    return [*rest, None]


def _raise_no_shards(source: Store, packed: Sequence[str]) -> None:
    if packed:
        rule = f"its shards are compressed, such as {packed[0]}: no sample can be read by itself"
        hint = f"Unpack them, such as: gzip -dk {packed[0]}"
        raise DataError(source.url, rule, hint=hint)
    hint = "Check the URL; pictures in folders are packed with gatdist pack"
    raise DataError(source.url, "holds no shards (.tar)", hint=hint)
