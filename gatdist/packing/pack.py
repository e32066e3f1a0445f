"""Packing as a whole: plan the shards, and finish the data set when all are packed.

The destination's folder ``packing/`` holds the state for a rerun::

    packing/plan.json           the request, and a fingerprint of the plan; others are refused
    packing/shard-000000.json   the record of a shard, written after it
    packing/spool/              copies of what can't be read in any order, such as compressed tars

A kill at any moment leaves complete files of the plan, or nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from gatdist.common.errors import DataError
from gatdist.config import redact_url
from gatdist.data.codecs import CodecError
from gatdist.data.format.manifest import MANIFEST, SampleSpec, write_manifest
from gatdist.packing.convert import CONVERTERS, Converter
from gatdist.packing.entries import Entry, Listing, Skipped, printable
from gatdist.packing.fetch import Fetcher, require_allowed
from gatdist.packing.labels import numbered, same_but_for_case
from gatdist.packing.outcome import EXAMPLES, REPORT, outcome, strict_error, write_report
from gatdist.packing.sources import list_source
from gatdist.packing.sources.tree import same_label
from gatdist.packing.task import NOTES, Job, Record, Request, Task, cut, fingerprint, in_order
from gatdist.storage import Store
from gatdist.storage.local import TEMPORARY

PLAN = f"{NOTES}/plan.json"
SPOOL = f"{NOTES}/spool"

# Samples that are read to find what all have in common, and converted to estimate their sizes.
_PROBED, _CONVERTED = 64, 8
_PLAN_VERSION = 1
# Overhead of a file in a tar: a header of 512 bytes, and padding to a multiple of 512.
_TAR_BYTES = 512 + 256
# Names in the manifest that differ.
_MODALITIES = {"array": "points"}


@dataclass(frozen=True)
class Packing:
    """A plan."""

    job: Job
    tasks: Sequence[Task]  # one per shard
    spec: SampleSpec
    source: str  # its URL, without secrets
    kind: str
    skipped: Sequence[Skipped]
    ignored: Sequence[Skipped]
    notes: Sequence[str]  # warnings for the user
    num_bytes: int  # estimated, of the shards
    began_s: float  # by the clock of file dates


def prepare(request: Request, *, dry_run: bool = False) -> Packing:
    """List the source, probe some samples, and plan the shards; a dry run writes nothing.

    Raises DataError if the source holds nothing usable, or the destination something else.
    """
    began_s = time.time()
    dest = Store(request.dest, request.dest_options)
    _require_apart(request.source, request.dest)
    noted = _noted(request, dest)
    if not (noted or dry_run):
        _note(request, dest, None)
    with _spool(dest, dry_run) as spool:
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
        entries = in_order(entries)
        convert, sizes = _probe(request, listing, entries, spool)
    tasks = cut(entries, sizes, request.recipe.shard_bytes)
    found = fingerprint(tasks)
    if noted and noted["fingerprint"] != found:
        rule = "the source has changed since some of its shards were packed"
        raise DataError(
            redact_url(request.dest), rule, hint="Delete that folder, or choose another"
        )
    if not dry_run:
        _note(request, dest, found)
    resolved = request.model_dump() | {"source": folder, "recipe": convert.recipe}
    job = Job(
        **resolved,
        modality=listing.modality,
        sample_shape=convert.sample_shape,
        has_labels=num_classes > 0,
    )
    return Packing(
        job=job,
        tasks=tasks,
        spec=_spec(job, class_names, num_classes),
        source=Store(request.source, request.source_options).url,
        kind=kind,
        skipped=sorted(skipped),
        ignored=sorted(listing.ignored),
        notes=notes,
        num_bytes=round(sum(sizes)),
        began_s=began_s,
    )


def preview(packing: Packing) -> dict[str, Any]:
    """Return the plan as JSON values; ``bytes`` is an estimate from the first samples."""
    job = packing.job
    return {
        "url": Store(job.dest).url,
        "source": packing.source,
        "kind": packing.kind,
        "modality": packing.spec.modality,
        "sample_shape": list(job.sample_shape),
        "num_classes": packing.spec.num_classes,
        "class_names": list(packing.spec.class_names or ()),
        "shards": len(packing.tasks),
        "samples": sum(len(task.entries) for task in packing.tasks),
        "bytes": packing.num_bytes,
        "skipped": len(packing.skipped),
        "skipped_examples": [list(pair) for pair in packing.skipped[:EXAMPLES]],
        "ignored": len(packing.ignored),
        "notes": list(packing.notes),
        "recipe": job.recipe.model_dump(mode="json"),
    }


def finish(packing: Packing, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report and the manifest, given the records of all tasks in their order.

    Returns ``kind``, ``empty_classes`` (the number of classes without a sample, which keep their
    numbers), ``empty_class_examples``, and what :func:`~gatdist.packing.outcome.outcome` returns.

    Raises DataError if no sample could be packed; or, if strict, one could not.
    """
    job = packing.job
    dest = Store(job.dest, job.dest_options)
    skipped = [*packing.skipped, *(pair for record in records for pair in record.skipped)]
    write_report(dest, skipped, packing.ignored, strict=job.strict)
    shards = [record.shard for record in records if record.shard]
    if not shards:
        name, reason = skipped[0]
        rule = f"none of its samples can be packed ({name} {reason})"
        raise DataError(redact_url(job.source), rule, hint=f"See {dest.url}/{REPORT}")
    write_manifest(dest, shards, packing.spec)
    dest.delete(SPOOL)
    _remove_temporary(dest, packing.began_s)
    remarks = [record.remarks for record in records]
    return {
        "kind": packing.kind,
        **outcome(dest, packing.spec, shards, skipped, packing.ignored, remarks),
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
    empty = [number for number in range(packing.spec.num_classes) if number not in used]
    names = packing.spec.class_names or range(packing.spec.num_classes)
    examples = [str(names[number]) for number in empty[:EXAMPLES]]
    return {"empty_classes": len(empty), "empty_class_examples": examples}


def _spec(job: Job, class_names: Sequence[str] | None, num_classes: int) -> SampleSpec:
    is_image, is_audio = job.modality == "image", job.modality == "audio"
    values = {
        "modality": _MODALITIES.get(job.modality, job.modality),
        "sample_shape": list(job.sample_shape),
        "bits": job.recipe.bits if is_image else 8,
        "sample_rate": job.recipe.sample_rate if is_audio else None,
        "num_classes": num_classes,
        "class_names": class_names or None,
    }
    return SampleSpec.model_validate(values)


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


def _probe(
    request: Request, listing: Listing, entries: Sequence[Entry], spool: Store
) -> tuple[Converter, list[float]]:
    """The converter for all samples, and the estimated bytes of each in a shard.

    Both depend on the first samples alone, in their order, so that a rerun finds the same.
    """
    reason = ""
    with Fetcher([listing.store, spool], request.allowed_origins) as fetcher:
        for first in range(0, len(entries), _PROBED):
            contents = []
            for entry, files in fetcher.fetch(entries[first : first + _PROBED]):
                if isinstance(files, str):
                    reason = reason or f"{entry.name} {files}"
                else:
                    contents.append(files[entry.component])
            convert = CONVERTERS[listing.modality].like(request.recipe, contents)
            packed: list[tuple[bytes, bytes]] = []
            if convert is None:
                continue
            for content in contents:
                if len(packed) == _CONVERTED:
                    break
                try:
                    packed.append((content, convert(content).content))
                except CodecError as error:
                    reason = reason or f"one {error}"
            if packed:
                return convert, _sizes(entries, packed)
    rule = f"none of its {len(entries)} samples can be packed ({reason or 'they are unreadable'})"
    raise DataError(redact_url(request.source), rule, hint="Check SOURCE and --kind")


def _sizes(entries: Sequence[Entry], packed: Sequence[tuple[bytes, bytes]]) -> list[float]:
    mean = sum(len(after) for _, after in packed) / len(packed)
    stay = all(before == after for before, after in packed)
    sizes = []
    for entry in entries:
        num_files = 1 + (entry.label is not None) + len(entry.others)
        size = entry.size if stay and entry.size is not None else mean
        sizes.append(size + num_files * _TAR_BYTES)
    return sizes


def _noted(request: Request, dest: Store) -> dict[str, Any] | None:
    """The plan of an earlier start; None if no shard was packed. DataError if it is another."""
    hint = "Choose another DEST, or delete that folder"
    if not dest.exists(PLAN):
        if names := [name for name in dest.list() if name != NOTES]:
            what = "a data set" if MANIFEST in names else f"other files, such as {names[0]}"
            raise DataError(dest.url, f"holds {what}", hint=hint)
        return None
    try:
        noted: dict[str, Any] = json.loads(dest.read(PLAN))
        theirs = noted["request"]
        noted["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{dest.url}/{PLAN}", "is not the plan of a packing", hint=hint) from None
    if noted["fingerprint"] is None:  # nothing was packed yet
        return None
    requested = _settings(request)
    for key in sorted(requested.keys() | theirs.keys()):
        if requested.get(key) != theirs.get(key):
            rule = f"holds another packing, with {key} {theirs.get(key)}, not {requested.get(key)}"
            raise DataError(dest.url, rule, hint=hint)
    return noted


def _note(request: Request, dest: Store, found: str | None) -> None:
    plan = {"version": _PLAN_VERSION, "request": _settings(request), "fingerprint": found}
    dest.publish(PLAN, json.dumps(plan, indent=1).encode())


def _settings(request: Request) -> dict[str, Any]:
    return {
        "source": Store(request.source, request.source_options).url,  # without its secrets
        **asdict(request.selection),
        **request.recipe.model_dump(mode="json"),
    }


def _remove_temporary(dest: Store, before_s: float) -> None:
    if dest.is_local:
        for path in dest.local_path().rglob(f".*{TEMPORARY}"):
            if path.stat().st_mtime < before_s:
                path.unlink()


@contextmanager
def _spool(dest: Store, dry_run: bool) -> Iterator[Store]:
    if not dry_run:
        yield dest.child(SPOOL)
        return
    with tempfile.TemporaryDirectory(prefix="gatdist-pack-") as folder:
        yield Store(folder)


def _require_apart(source: str, dest: str) -> None:
    source, dest = redact_url(source), redact_url(dest)
    paths = (url if "://" in url else os.path.realpath(url) for url in (dest, source))
    inside, outside = (f"{path.rstrip('/')}/" for path in paths)
    if inside.startswith(outside):
        hint = "Choose a folder outside of it"
        raise DataError("DEST", f"is inside SOURCE ({source})", value=dest, hint=hint)
    if outside.startswith(inside):
        raise DataError("SOURCE", f"is inside DEST ({dest})", value=source, hint="Choose another")
