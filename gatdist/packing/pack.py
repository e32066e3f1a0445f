"""Packing as a whole: what is to be done, and what is left when all of it is done.

In the destination, the folder ``packing/`` holds what a rerun needs::

    packing/plan.json           what is packed, and how; another packing is refused
    packing/shard-000000.json   what became of a shard, written after it
    packing/spool/              what had to be copied before it could be read in any order

A kill at any moment leaves files that are whole and belong to the plan, or nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from gatdist.common.errors import DataError
from gatdist.config import redact_url
from gatdist.data.codecs import CodecError
from gatdist.data.format import MANIFEST, SampleSpec, write_manifest
from gatdist.packing.convert import converter_like
from gatdist.packing.converted import Converter, counted
from gatdist.packing.entries import Entry, Listing, Selection, Skipped, printable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.labels import numbered, same_but_for_case
from gatdist.packing.origins import require_allowed
from gatdist.packing.plan import Task, cut, fingerprint, in_order
from gatdist.packing.recipe import Recipe
from gatdist.packing.sources import list_source
from gatdist.packing.sources.tree import same_label
from gatdist.packing.task import NOTES, Job, Record, refused
from gatdist.storage import Store
from gatdist.storage.local import TEMPORARY

PLAN = f"{NOTES}/plan.json"
SPOOL = f"{NOTES}/spool"
REPORT = "report.jsonl"

# So many samples are looked at to see what they have in common, and so many converted to see how
# large they become.
_LOOKED_AT, _CONVERTED = 64, 8
_PLAN_VERSION = 1
_EXAMPLES = 3
# In a tar a file has a header of 512 bytes, and is filled up to a multiple of 512.
_TAR_BYTES = 512 + 256
# What the manifest calls a modality, where it is not the same.
_MODALITIES = {"array": "points"}


@dataclass(frozen=True)
class Request:
    """What the user wants.

    Attributes:
        source: URL of a file or folder.
        dest: URL of the data set's folder.
        recipe: what is done to each sample.
        selection: how the source is read.
        strict: a sample that can't be packed is an error.
        source_options: of the source's storage.
        dest_options: of the data set's storage.
        allowed_origins: servers, buckets and folders, other than its own, that a list may name.
    """

    source: str
    dest: str
    recipe: Recipe = field(default_factory=Recipe)
    selection: Selection = field(default_factory=Selection)
    strict: bool = False
    source_options: Mapping[str, Any] = field(default_factory=dict)
    dest_options: Mapping[str, Any] = field(default_factory=dict)
    allowed_origins: Sequence[str] = ()


@dataclass(frozen=True)
class Packing:
    """A plan, ready to be carried out.

    Attributes:
        job: what all tasks share.
        tasks: one a shard.
        source: its URL, without secrets.
        kind: of the source.
        class_names: None where the classes have no names.
        num_classes: 0 where there are no labels.
        skipped: what of the source is no sample.
        ignored: files of operating systems and tools.
        notes: what the user should know, as sentences.
        num_bytes: what the shards will have, about.
        began_s: when this start was made, in seconds of the clock that files are dated by.
    """

    job: Job
    tasks: Sequence[Task]
    source: str
    kind: str
    class_names: Sequence[str] | None
    num_classes: int
    skipped: Sequence[Skipped]
    ignored: Sequence[Skipped]
    notes: Sequence[str]
    num_bytes: int
    began_s: float


def prepare(request: Request, *, dry_run: bool = False) -> Packing:
    """List the source, look at some of it, and plan the shards.

    Args:
        request: what the user wants.
        dry_run: write nothing to the destination.

    Raises:
        DataError: the source holds nothing usable, or the destination something else.
        StorageError: a URL can't be used.
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
            raise refused(sorted(skipped))
        entries = in_order(entries)
        convert, sizes = _look(request, listing, entries, spool)
    tasks = cut(entries, sizes, request.recipe.shard_bytes)
    found = fingerprint(tasks)
    if noted and noted["fingerprint"] != found:
        rule = "the source has changed since some of its shards were packed"
        raise DataError(
            redact_url(request.dest), rule, hint="Delete that folder, or choose another"
        )
    if not dry_run:
        _note(request, dest, found)
    job = Job(
        source=folder,
        source_options=dict(request.source_options),
        dest=request.dest,
        dest_options=dict(request.dest_options),
        allowed_origins=list(request.allowed_origins),
        recipe=convert.recipe,
        modality=listing.modality,
        sample_shape=convert.sample_shape,
        has_labels=num_classes > 0,
        strict=request.strict,
    )
    return Packing(
        job=job,
        tasks=tasks,
        source=Store(request.source, request.source_options).url,
        kind=kind,
        class_names=class_names,
        num_classes=num_classes,
        skipped=sorted(skipped),
        ignored=sorted(listing.ignored),
        notes=notes,
        num_bytes=round(sum(sizes)),
        began_s=began_s,
    )


def preview(packing: Packing) -> dict[str, Any]:
    """What is planned, as JSON values. ``bytes`` is a guess, from the first samples."""
    job = packing.job
    return {
        "url": Store(job.dest).url,
        "source": packing.source,
        "kind": packing.kind,
        "modality": _spec(packing).modality,
        "sample_shape": list(job.sample_shape),
        "num_classes": packing.num_classes,
        "class_names": list(packing.class_names or ()),
        "shards": len(packing.tasks),
        "samples": sum(len(task.entries) for task in packing.tasks),
        "bytes": packing.num_bytes,
        "skipped": len(packing.skipped),
        "skipped_examples": [list(out) for out in packing.skipped[:_EXAMPLES]],
        "ignored": len(packing.ignored),
        "notes": list(packing.notes),
        "recipe": job.recipe.model_dump(mode="json"),
    }


def finish(packing: Packing, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report and the manifest, and tell what there is.

    Args:
        packing: the plan.
        records: what became of its tasks, in their order.

    Returns:
        ``url, kind, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        skipped_examples`` and ``report`` (a name, None without one); of each of ``REMARKS``, such
        as ``transparent``, how many samples, and under ``transparent_example`` the first; of
        classes without a sample, how many in ``empty_classes``, and the first ones in
        ``empty_class_examples``. These keep their numbers.

    Raises:
        DataError: no sample could be packed; or strict, and some could not.
        StorageError: nothing can be written to the destination.
    """
    job = packing.job
    dest = Store(job.dest, job.dest_options)
    skipped = [*packing.skipped, *(out for record in records for out in record.skipped)]
    reported = [*skipped, *packing.ignored]
    if reported:
        lines = (json.dumps({"source": name, "reason": why}) for name, why in reported)
        dest.publish(REPORT, "".join(f"{line}\n" for line in lines).encode())
    if job.strict and skipped:
        raise refused(skipped)
    shards = [record.shard for record in records if record.shard]
    if not shards:
        rule = "none of its samples can be packed"
        name, reason = skipped[0]
        rule += f" ({name} {reason})"
        raise DataError(redact_url(job.source), rule, hint=f"See {dest.url}/{REPORT}")
    write_manifest(dest, shards, _spec(packing))
    dest.delete(SPOOL)
    _sweep(dest, packing.began_s)
    return {
        "url": dest.url,
        "kind": packing.kind,
        "modality": _spec(packing).modality,
        "sample_shape": list(job.sample_shape),
        "num_classes": packing.num_classes,
        "shards": len(shards),
        "samples": sum(shard.num_samples for shard in shards),
        "bytes": sum(shard.size for shard in shards),
        "skipped": len(skipped),
        "skipped_examples": [list(out) for out in skipped[:_EXAMPLES]],
        **counted([record.remarks for record in records]),
        **_empty_classes(packing, records),
        "ignored": len(packing.ignored),
        "report": REPORT if reported else None,
    }


def _empty_classes(packing: Packing, records: Sequence[Record]) -> dict[str, Any]:
    """Of the classes that no packed sample has: how many, and the first."""
    unpacked = {out[0] for record in records for out in record.skipped}
    used = {
        entry.label
        for task in packing.tasks
        for entry in task.entries
        if printable(entry.name) not in unpacked
    }
    empty = [number for number in range(packing.num_classes) if number not in used]
    names = packing.class_names or range(packing.num_classes)
    examples = [str(names[number]) for number in empty[:_EXAMPLES]]
    return {"empty_classes": len(empty), "empty_class_examples": examples}


def _spec(packing: Packing) -> SampleSpec:
    job = packing.job
    return SampleSpec.model_validate(
        {
            "modality": _MODALITIES.get(job.modality, job.modality),
            "sample_shape": list(job.sample_shape),
            "bits": job.recipe.bits if job.modality == "image" else 8,
            "sample_rate": job.recipe.sample_rate if job.modality == "audio" else None,
            "num_classes": packing.num_classes,
            "class_names": list(packing.class_names) if packing.class_names else None,
        }
    )


def _once(entries: Iterable[Entry], skipped: list[Skipped]) -> list[Entry]:
    found: dict[str, Entry] = {}
    conflicts: dict[str, Entry] = {}
    for entry in entries:
        first = found.setdefault(entry.name, entry)
        if first is entry:
            continue
        if same_label(first.label, entry.label):
            skipped.append((entry.name, "stands twice, and the first was taken"))
        else:
            conflicts.setdefault(entry.name, entry)
    for name, entry in conflicts.items():
        labels = f"{found.pop(name).label!r} and {entry.label!r}"
        skipped.append((name, f"is listed with two labels, {labels}"))
    return list(found.values())


def _notes(
    request: Request, listing: Listing, class_names: Sequence[str] | None, num_classes: int
) -> Iterator[str]:
    """What the user should know of the labels and of what is passed over."""
    labels = request.selection.labels
    if labels not in (None, "none") and not num_classes:
        rule = "no sample has a label there"
        raise DataError("--labels", rule, value=labels, hint="Name another place, or none")
    if pair := same_but_for_case(class_names):
        yield f"the classes {pair[0]} and {pair[1]} differ in upper and lower case only"
    if count := len(listing.ignored):
        name, reason = listing.ignored[0]
        yield f"{count} files are passed over, such as {name}, which {reason}"


def _look(
    request: Request, listing: Listing, entries: Sequence[Entry], spool: Store
) -> tuple[Converter, list[float]]:
    """What the samples have in common, and about how many bytes each will take in a shard.

    A function of the first samples alone, in their order, so that a rerun finds the same.
    """
    reason = ""
    with Fetcher([listing.store, spool], request.allowed_origins) as fetcher:
        for first in range(0, len(entries), _LOOKED_AT):
            contents = []
            for entry, files in fetcher.fetch(entries[first : first + _LOOKED_AT]):
                if isinstance(files, str):
                    reason = reason or f"{entry.name} {files}"
                else:
                    contents.append(files[entry.component])
            convert = converter_like(listing.modality, request.recipe, contents)
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
    """Bytes in a shard: the source's own where files stay as they are, else the usual ones."""
    usual = sum(len(after) for _, after in packed) / len(packed)
    stay = all(before == after for before, after in packed)
    sizes = []
    for entry in entries:
        num_files = 1 + (entry.label is not None) + len(entry.others)
        size = entry.size if stay and entry.size is not None else usual
        sizes.append(size + num_files * _TAR_BYTES)
    return sizes


def _noted(request: Request, dest: Store) -> dict[str, Any] | None:
    """What a former start has noted in the destination; None where no shard can be there.

    Raises:
        DataError: the folder holds something else than this packing.
    """
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
        raise DataError(f"{dest.url}/{PLAN}", "is no plan of a packing", hint=hint) from None
    if noted["fingerprint"] is None:  # nothing was packed yet
        return None
    ours = _settings(request)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            rule = f"holds another packing, with {key} {theirs.get(key)}, not {ours.get(key)}"
            raise DataError(dest.url, rule, hint=hint)
    return noted


def _note(request: Request, dest: Store, found: str | None) -> None:
    plan = {"version": _PLAN_VERSION, "request": _settings(request), "fingerprint": found}
    dest.publish(PLAN, json.dumps(plan, indent=1).encode())


def _settings(request: Request) -> dict[str, Any]:
    """All that decides which bytes are written."""
    return {
        "source": Store(request.source, request.source_options).url,  # without its secrets
        **asdict(request.selection),
        **request.recipe.model_dump(mode="json"),
    }


def _sweep(dest: Store, before_s: float) -> None:
    """Remove what writers that were killed left beside the files that they wrote."""
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
        raise DataError("DEST", f"lies inside SOURCE ({source})", value=dest, hint=hint)
    if outside.startswith(inside):
        raise DataError("SOURCE", f"lies inside DEST ({dest})", value=source, hint="Choose another")
