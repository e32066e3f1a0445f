"""``gatdist apply`` as a whole: find the files and the outputs that are missing, and report.

OUT holds, besides the outputs::

    apply.json      the checkpoint; outputs of another are refused
    report.jsonl    files that were skipped, with reasons
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import redact_url
from gatdist.data.format.manifest import MANIFEST, Manifest, read_manifest
from gatdist.data.format.shard_files import read_index
from gatdist.data.modalities import components_of
from gatdist.packing.entries import (
    Entry,
    Listing,
    Part,
    Selection,
    Skipped,
    Span,
    all_named,
    printable,
)
from gatdist.packing.fetch import require_allowed, require_apart
from gatdist.packing.outcome import EXAMPLES, REPORT, write_report
from gatdist.packing.sources import list_source
from gatdist.runs import TrainedRun, load_run
from gatdist.runs.applying.files import Readable, output_name, readable_fields
from gatdist.runs.applying.work import (
    SPOOL,
    STRICT_HINT,
    Applied,
    Job,
    Record,
    Request,
    Task,
    source_of,
)
from gatdist.runs.generator import Generator
from gatdist.storage import Store
from gatdist.storage.local import links

SETTINGS = "apply.json"
# Files of a task at most, and tasks if there are as many files.
_TASK_FILES, _TASKS = 64, 64


@dataclass(frozen=True)
class Plan:
    """What remains to be done."""

    job: Job
    tasks: Sequence[Task]
    field: str
    samples_seen: int
    num_files: int
    found: int  # outputs that an earlier start has written
    skipped: Sequence[Skipped]
    ignored: Sequence[Skipped]
    notes: Sequence[str]


def prepare(request: Request) -> Plan:
    """List the inputs whose outputs are missing, and divide them into tasks.

    Raises:
        CheckpointError: No run, or no such checkpoint.
        ConfigError: The run takes no input that files hold, or an option does not fit.
        DataError: The source holds nothing usable, or the destination something else.
    """
    dest = Store(request.dest, request.dest_options)
    require_apart(Store(request.source, request.source_options), dest, "INPUT", "OUT")
    if dest.exists("config.json"):
        raise DataError("OUT", "is a run directory", value=dest.url, hint="Choose another folder")
    run = load_run(Store(request.run), torch.device("cpu"), request.checkpoint)
    generator = Generator.of(run)
    readable = readable_fields(generator, Store(request.run).url)
    class_number = _class_number(run, request.label)
    about = _settings(request, run) | ({"class": class_number} if run.num_classes else {})
    existing = _existing(dest, about)
    _require_no_links(dest, [SETTINGS, REPORT, SPOOL])
    folder, is_dataset, listing = _listed(request, readable, dest.child(SPOOL))
    require_allowed(listing, [dest.child(SPOOL)], request.allowed_origins)
    field = readable.fields[listing.modalities[0]]
    if request.tile is not None:  # may be too small
        Applied(generator, tile=request.tile, class_number=class_number).axes(field)
    skipped = list(listing.skipped)
    outputs = _outputs(listing.entries, generator.sample_format.ending, skipped)
    if request.strict and skipped:
        raise all_named(sorted(skipped), hint=STRICT_HINT)
    if not outputs:
        name, reason = skipped[0]
        rule = f"none of its files can be used ({printable(name)} {reason})"
        raise DataError("INPUT", rule, value=redact_url(request.source))
    missing = [(entry, name) for name, entry in outputs.items() if name not in existing]
    _require_no_links(dest, [name for _, name in missing])
    dest.publish(SETTINGS, json.dumps(about, indent=1).encode())
    shared = request.model_dump()
    shared |= {"source": folder, "checkpoint": run.checkpoint.name, "is_dataset": is_dataset}
    shared |= {"class_number": class_number}
    return Plan(
        job=Job(**shared),
        tasks=_tasks(missing),
        field=field,
        samples_seen=generator.samples_seen,
        num_files=len(outputs),
        found=len(outputs) - len(missing),
        skipped=skipped,
        ignored=listing.ignored,
        notes=listing.notes,
    )


def summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "run": Store(plan.job.run).url,
        "source": redact_url(plan.job.source),
        "url": Store(plan.job.dest, plan.job.dest_options).url,
        "field": plan.field,
        "samples_seen": plan.samples_seen,
        "files": plan.num_files,
        "found": plan.found,
        "notes": list(plan.notes),
    }


def finish(plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """Write the report; return the outcome, given the records of all tasks.

    Raises DataError if there is no output at all.
    """
    job = plan.job
    dest = Store(job.dest, job.dest_options)
    dest.delete(SPOOL)
    skipped = [*plan.skipped, *(pair for record in records for pair in record.skipped)]
    if skipped or plan.ignored:
        write_report(dest, sorted(skipped), plan.ignored, strict=False)
    else:
        dest.delete(REPORT)
    failed = sum(len(record.skipped) for record in records)
    if failed == plan.num_files:
        name, reason = records[0].skipped[0]
        rule = f"none of its files can be used ({name} {reason})"
        hint = f"See {dest.url}/{REPORT}"
        raise DataError("INPUT", rule, value=redact_url(job.source), hint=hint)
    return summary(plan) | {
        "written": plan.num_files - plan.found - failed,
        "skipped": len(skipped),
        "skipped_examples": [list(pair) for pair in sorted(skipped)[:EXAMPLES]],
        "ignored": len(plan.ignored),
        "report": REPORT if skipped or plan.ignored else None,
    }


def _settings(request: Request, run: TrainedRun) -> dict[str, Any]:
    return {"run": Store(request.run).url, "checkpoint": run.checkpoint.name}


def _class_number(run: TrainedRun, label: str) -> int | None:
    if label or not run.num_classes:
        return run.class_number(label, "--label") if label else None
    hint = f"Name a class, 0 to {run.num_classes - 1}, such as --label 0"
    raise ConfigError("--label", "is required: the generator is class-conditional", hint=hint)


def _existing(dest: Store, about: dict[str, Any]) -> set[str]:
    """Return the files of an earlier start. Raises DataError if they are others."""
    content = dest.read_if_exists(SETTINGS)
    found = set(dest.find())
    if content is None:
        if found:
            rule = f"holds other files, such as {min(found)}"
            raise DataError("OUT", rule, value=dest.url, hint="Choose another folder")
        return found
    try:
        theirs = json.loads(content)
        same = theirs == about
    except ValueError:
        same, theirs = False, {}
    if not same:
        what = " of ".join(str(theirs[key]) for key in ("checkpoint", "run") if key in theirs)
        rule = f"holds outputs of another generator, {what or 'an unknown one'}"
        hint = "Choose another folder, or that checkpoint with --checkpoint"
        if "class" in theirs and theirs == about | {"class": theirs["class"]}:
            rule, hint = f"holds outputs of class {theirs['class']}", "Choose another folder"
        raise DataError("OUT", rule, value=dest.url, hint=hint)
    return found


def _require_no_links(dest: Store, names: Iterable[str]) -> None:
    """Raise DataError if a file would be written through a symbolic link below the folder."""
    if not (dest.is_local and dest.local_path().is_dir()):
        return
    root = str(dest.local_path())
    found = {os.path.relpath(link, root) for link in links(root)}
    for name in names if found else ():
        parts = name.split("/")
        for link in found.intersection(accumulate(parts, "{}/{}".format)):
            rule = f"holds a symbolic link at {printable(link)}, which nothing is written through"
            raise DataError("OUT", rule, value=dest.url, hint="Remove it, or choose another folder")


def _listed(request: Request, readable: Readable, spool: Store) -> tuple[str, bool, Listing]:
    """Return the folder of the inputs, whether it is a data set, and the inputs."""
    store = Store(request.source, request.source_options)
    if store.exists(MANIFEST):
        tars = source_of(request.source, request.source_options, True)
        return request.source, True, _of_dataset(store, tars, read_manifest(store), readable)
    selection = Selection(request.kind, "none", request.column)
    _, folder, listing = list_source(request.source, selection, spool, request.source_options)
    (modality,) = listing.modalities
    if modality not in readable.fields:
        wanted = " or ".join(f"{kind} ({field})" for kind, field in readable.fields.items())
        rule = f"holds {modality} files, and the generator takes {wanted}"
        raise DataError("INPUT", rule, value=redact_url(request.source))
    return folder, False, listing


def _of_dataset(store: Store, tars: Store, manifest: Manifest, readable: Readable) -> Listing:
    """List the samples of a data set by its indexes: their main field."""
    others = manifest.fields or {}
    own = manifest if readable.is_target or not others else None
    spec = others.get(readable.main, own)
    modality = "" if spec is None else {"points": "array"}.get(spec.modality, spec.modality)
    if spec is None or modality not in readable.fields:
        rule = f"the data set has no field {readable.main!r} of {' or '.join(readable.fields)}"
        hint = f"It has {', '.join([manifest.modality, *others])}"
        raise DataError("INPUT", rule, value=store.url, hint=hint)
    components = components_of(spec.modality, spec.component)

    def entries() -> Iterator[Entry]:
        for shard in manifest.shards:
            for row in read_index(store, shard):
                component = row["component"].decode()
                if component in components:
                    start, size = int(row["offset"]), int(row["size"])
                    span = Span(shard.name, start, start + size, size)
                    ending = component.rpartition(".")[2]
                    name = f"{shard.name.removesuffix('.tar')}/{row['key'].decode()}.{ending}"
                    yield Entry(name, (Part(ending, span),))

    return Listing(tars, [modality], list(entries()))


def _outputs(entries: Sequence[Entry], ending: str, skipped: list[Skipped]) -> dict[str, Entry]:
    """Return the entry of each output's name, in the order of names."""
    found: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = output_name(entry, ending)
        if not name:
            skipped.append((entry.name, "has a name that leads out of OUT"))
        elif name in found:
            reason = f"would overwrite the output of {printable(found[name].name)}"
            skipped.append((entry.name, reason))
        else:
            found[name] = entry
    return found


def _tasks(missing: Sequence[tuple[Entry, str]]) -> list[Task]:
    size = min(_TASK_FILES, -(-len(missing) // _TASKS) or 1)
    return [
        Task(number, *map(list, zip(*missing[start : start + size], strict=True)))
        for number, start in enumerate(range(0, len(missing), size))
    ]
