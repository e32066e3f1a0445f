"""Packing as a whole: plan the shards, and finish the data set when all are packed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gatdist.common.errors import DataError
from gatdist.config import redact_url
from gatdist.data.format.manifest import SampleSpec, write_manifest
from gatdist.packing.entries import Entry, Listing, Skipped, printable
from gatdist.packing.fetch import require_allowed, require_apart
from gatdist.packing.labels import numbered, same_but_for_case
from gatdist.packing.outcome import EXAMPLES, REPORT, outcome, strict_error, write_report
from gatdist.packing.probe import probe
from gatdist.packing.samples import Field
from gatdist.packing.sources import list_source
from gatdist.packing.sources.tree import same_label
from gatdist.packing.state import SPOOL, note_plan, noted_plan, open_spool, remove_temporary
from gatdist.packing.task import Job, Record, Request, Task, cut, fingerprint, in_order
from gatdist.storage import Store

# Names in the manifest that differ.
_MODALITIES = {"array": "points"}


@dataclass(frozen=True)
class Source:
    """What is packed."""

    url: str  # without secrets
    kind: str
    folder: str  # URL that names of files are relative to
    store: Store  # that folder
    modalities: Mapping[str, str]  # of the fields by name, "" of the only one
    entries: Sequence[Entry]  # as they are packed
    class_names: Sequence[str] | None
    num_classes: int
    skipped: Sequence[Skipped]
    ignored: Sequence[Skipped]
    notes: Sequence[str]  # warnings for the user


@dataclass(frozen=True)
class Packing:
    """A plan."""

    job: Job
    tasks: Sequence[Task]  # one per shard
    source: Source
    num_bytes: int  # estimated, of the shards
    began_s: float  # by the clock of file dates


def prepare(request: Request, *, dry_run: bool = False) -> Packing:
    """List the source, probe some samples, and plan the shards; a dry run writes nothing.

    Raises DataError if the source holds nothing usable, or the destination something else.
    """
    began_s = time.time()
    dest = Store(request.dest, request.dest_options)
    require_apart(Store(request.source, request.source_options), dest, "SOURCE", "DEST")
    noted = noted_plan(request, dest)
    with open_spool(dest, noted, dry_run) as spool:
        if not (noted or dry_run):
            note_plan(request, dest, None)
        source = _list(request, spool)
        convert, sizes = probe(request, source.modalities, source.entries, [source.store, spool])
        tasks = cut(source.entries, sizes, request.recipe.shard_bytes)
        found = fingerprint(tasks)
        if noted and noted["fingerprint"] != found:
            rule = "the source has changed since some of its shards were packed"
            hint = "Delete that folder, or choose another"
            raise DataError(redact_url(request.dest), rule, hint=hint)
    if not dry_run:
        note_plan(request, dest, found)
    resolved = request.model_dump() | {"source": source.folder, "recipe": convert.fields[0].recipe}
    job = Job(**resolved, fields=tuple(convert.fields), has_labels=source.num_classes > 0)
    return Packing(job, tasks, source, round(sum(sizes)), began_s)


def _list(request: Request, spool: Store) -> Source:
    kind, folder, listing = list_source(
        request.source, request.selection, spool, request.source_options
    )
    require_allowed(listing, [listing.store, spool], request.allowed_origins)
    skipped = listing.skipped
    entries, class_names, num_classes = numbered(
        _once(listing.entries, skipped), listing.class_names, skipped
    )
    notes = [*listing.notes, *_notes(request, listing, class_names, num_classes)]
    if request.strict and skipped:
        raise strict_error(sorted(skipped))
    return Source(
        url=Store(request.source, request.source_options).url,
        kind=kind,
        folder=folder,
        store=listing.store,
        modalities=dict(zip(request.selection.fields or [""], listing.modalities, strict=True)),
        entries=in_order(entries),
        class_names=class_names,
        num_classes=num_classes,
        skipped=sorted(skipped),
        ignored=sorted(listing.ignored),
        notes=notes,
    )


def preview(packing: Packing) -> dict[str, Any]:
    """Return the plan as JSON values; ``bytes`` is an estimate from the first samples."""
    job, source = packing.job, packing.source
    return {
        "url": Store(job.dest).url,
        "source": source.url,
        "kind": source.kind,
        "modality": _modality(job.fields[0]),
        "sample_shape": list(job.fields[0].sample_shape),
        "fields": [
            {
                "name": field.name,
                "modality": _modality(field),
                "sample_shape": list(field.sample_shape),
                "sample_rate": field.recipe.sample_rate,
            }
            for field in job.fields
        ],
        "num_classes": source.num_classes,
        "class_names": list(source.class_names or ()),
        "shards": len(packing.tasks),
        "samples": sum(len(task.entries) for task in packing.tasks),
        "bytes": packing.num_bytes,
        "skipped": len(source.skipped),
        "skipped_examples": [list(pair) for pair in source.skipped[:EXAMPLES]],
        "ignored": len(source.ignored),
        "notes": list(source.notes),
        "recipe": job.recipe.model_dump(mode="json"),
    }


def finish(packing: Packing, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report and the manifest, given the records of all tasks in their order.

    Returns ``kind``, ``empty_classes`` (the number of classes without a sample, which keep their
    numbers), ``empty_class_examples``, and what :func:`~gatdist.packing.outcome.outcome` returns.

    Raises DataError if no sample could be packed; or, if strict, one could not.
    """
    job, source = packing.job, packing.source
    dest = Store(job.dest, job.dest_options)
    skipped = [*source.skipped, *(pair for record in records for pair in record.skipped)]
    write_report(dest, skipped, source.ignored, strict=job.strict)
    shards = [record.shard for record in records if record.shard]
    if not shards:
        name, reason = skipped[0]
        rule = f"none of its samples can be packed ({name} {reason})"
        raise DataError(redact_url(job.source), rule, hint=f"See {dest.url}/{REPORT}")
    spec = _spec(packing, records)
    write_manifest(dest, shards, spec)
    dest.delete(SPOOL)
    remove_temporary(dest, packing.began_s)
    remarks = [record.remarks for record in records]
    return {
        "kind": source.kind,
        **outcome(dest, spec, shards, skipped, source.ignored, remarks),
        **_empty_classes(packing, records),
    }


def _empty_classes(packing: Packing, records: Sequence[Record]) -> dict[str, Any]:
    unpacked = {name for record in records for name, _ in record.skipped}
    used = {
        entry.label
        for task in packing.tasks
        for entry in task.entries
        if printable(entry.name) not in unpacked
    }
    source = packing.source
    empty = [number for number in range(source.num_classes) if number not in used]
    names = source.class_names or range(source.num_classes)
    examples = [str(names[number]) for number in empty[:EXAMPLES]]
    return {"empty_classes": len(empty), "empty_class_examples": examples}


def _spec(packing: Packing, records: Sequence[Record]) -> SampleSpec:
    fields = packing.job.fields
    found = [
        {name for record in records if record.shard for name in record.components[i]}
        for i in range(len(fields))
    ]
    own, *others = [_field_spec(*each) for each in zip(fields, found, strict=True)]
    values = {
        **own,
        "num_classes": packing.source.num_classes,
        "class_names": packing.source.class_names or None,
        "fields": dict(zip([field.name for field in fields[1:]], others, strict=True)) or None,
    }
    return SampleSpec.model_validate(values)


def _field_spec(field: Field, components: Collection[str]) -> dict[str, Any]:
    any_component = f"{field.name}.*" if field.name else None
    return {
        "modality": _modality(field),
        "sample_shape": list(field.sample_shape),
        "bits": field.recipe.bits if field.modality == "image" else 8,
        "sample_rate": field.recipe.sample_rate if field.modality == "audio" else None,
        "component": min(components) if field.name and len(components) == 1 else any_component,
    }


def _modality(field: Field) -> str:
    return _MODALITIES.get(field.modality, field.modality)


def _once(entries: Iterable[Entry], skipped: list[Skipped]) -> list[Entry]:
    found: dict[str, Entry] = {}
    conflicts: dict[str, Entry] = {}
    for entry in entries:
        first = found.setdefault(entry.name, entry)
        if first is entry:
            continue
        if same_label(first.label, entry.label):
            skipped.append((entry.name, "is duplicate; the first was taken"))
        else:
            conflicts.setdefault(entry.name, entry)
    for name, entry in conflicts.items():
        labels = f"{found.pop(name).label!r} and {entry.label!r}"
        skipped.append((name, f"is listed with two labels, {labels}"))
    return list(found.values())


def _notes(
    request: Request, listing: Listing, class_names: Sequence[str] | None, num_classes: int
) -> Iterator[str]:
    labels = request.selection.labels
    if labels not in (None, "none") and not num_classes:
        rule = "no sample has a label there"
        raise DataError("--labels", rule, value=labels, hint="Name another place, or none")
    if pair := same_but_for_case(class_names):
        yield f"the classes {pair[0]} and {pair[1]} differ in upper and lower case only"
    if count := len(listing.ignored):
        name, reason = listing.ignored[0]
        yield f"{count} files are ignored, such as {name}, which {reason}"
