"""What packing and indexing report: skipped samples, remarks and the outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gatdist.common.errors import DataError
from gatdist.data.format.manifest import TARGET, SampleSpec, Shard
from gatdist.packing.entries import Skipped, all_named
from gatdist.storage import Store

REPORT = "report.jsonl"
EXAMPLES = 3

# Kinds of remarks: smaller or shorter than requested; composited on the background; converted from
# another color profile; read as sRGB because the profile is damaged; reduced from 16 to 8 bits;
# more than one frame or page.
REMARKS = ("upscaled", "transparent", "profiles", "damaged_profiles", "reduced", "animated")

# By kind: the number of samples, and the first one.
Remarks = dict[str, tuple[int, str]]


def add_remark(remarks: Remarks, kind: str, example: str) -> None:
    """Count a sample; ``example`` is kept if it is the first one."""
    count, first = remarks.get(kind, (0, example))
    remarks[kind] = count + 1, first


def strict_error(skipped: Sequence[Skipped]) -> DataError:
    """Return the error for skipped samples with ``--strict``."""
    return all_named(skipped, hint="Fix or remove them, or pack without --strict")


def write_report(
    dest: Store, skipped: Sequence[Skipped], ignored: Sequence[Skipped], *, strict: bool
) -> None:
    """Write ``report.jsonl`` if it is not empty. DataError if strict and samples were skipped."""
    reported = [*skipped, *ignored]
    if reported:
        lines = (json.dumps({"source": name, "reason": why}) for name, why in reported)
        dest.publish(REPORT, "".join(f"{line}\n" for line in lines).encode())
    if strict and skipped:
        raise strict_error(skipped)


def varying(spec: SampleSpec) -> list[str]:
    """Return the modalities of the fields whose samples differ in size or length."""
    fields = [spec, *(spec.fields or {}).values()]
    return sorted({field.modality for field in fields if None in field.sample_shape})


def outcome(
    dest: Store,
    spec: SampleSpec,
    shards: Sequence[Shard],
    skipped: Sequence[Skipped],
    ignored: Sequence[Skipped],
    remarks: Sequence[Remarks],
) -> dict[str, Any]:
    """Return the part of the outcome that packing and indexing share, as JSON values."""
    found: dict[str, Any] = {
        "url": dest.url,
        "modality": spec.modality,
        "sample_shape": list(spec.sample_shape),
        "fields": [TARGET, *(spec.fields or ())],
        "varying": varying(spec),
        "num_classes": spec.num_classes,
        "shards": len(shards),
        "samples": sum(shard.num_samples for shard in shards),
        "bytes": sum(shard.size for shard in shards),
        "skipped": len(skipped),
        "skipped_examples": [list(pair) for pair in skipped[:EXAMPLES]],
        "ignored": len(ignored),
        "report": REPORT if skipped or ignored else None,
    }
    for kind in REMARKS:
        those = [remark[kind] for remark in remarks if kind in remark]
        found[kind] = sum(count for count, _ in those)
        found[f"{kind}_example"] = those[0][1] if those else ""
    return found
