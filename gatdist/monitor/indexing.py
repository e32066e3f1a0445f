"""What indexing and verifying tell people, from facts that are JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gatdist.monitor.console import shown_path
from gatdist.monitor.numbers import count, duration, percent, size
from gatdist.monitor.packing import Event, plural, remarks

Facts = Mapping[str, Any]

_REMARKS = {
    "transparent": "stored with an alpha channel, which reading composites on white",
    "profiles": "stored with another color profile, which reading converts to sRGB",
    "damaged_profiles": "stored with a damaged color profile, and are read as sRGB",
    "reduced": "stored with 16 bits per channel, of which 8 are read (--bits 16 reads all)",
    "animated": "stored with several frames or pages, of which the first is read",
}
_NOUNS = {"image": "pictures", "audio": "sounds", "text": "texts", "points": "arrays"}


def opening(plan: Facts) -> Iterator[Event]:
    """What is said before indexing begins."""
    what = _NOUNS.get(plan["modality"], plan["modality"])
    labels = f", labels from {plan['label']}" if plan["label"] else ", without labels"
    shards = f"{plural(plan['shards'], 'shard')}, {size(plan['bytes'])}"
    yield (
        "start",
        {
            "message": f"indexing {what}{labels}: {shards_of(plan)}{shards}",
            "total": plan["bytes"],
            "unit": "bytes",
        },
    )


def closing(outcome: Facts) -> Iterator[Event]:
    """What is said when all is indexed."""
    yield from remarks(outcome, _REMARKS)
    message = f"after {duration(outcome['seconds'])}: {plural(outcome['samples'], 'sample')} in "
    message += f"{plural(outcome['shards'], 'shard')}"
    if outcome["num_classes"]:
        message += f", {plural(outcome['num_classes'], 'class', 'classes')}"
    skipped = ""
    if outcome["skipped"]:
        share = percent(outcome["skipped"] / (outcome["samples"] + outcome["skipped"]))
        report = shown_path(f"{outcome['url']}/{outcome['report']}")
        skipped = f"{count(outcome['skipped'])} ({share}), each with the reason in {report}"
        for name, reason in outcome["skipped_examples"]:
            skipped += f"\n{'':12}{name} {reason}"
    use = f"--set data.url={shown_path(outcome['url'])}"
    if outcome["shards_url"]:
        use += f" --set data.shards_url={outcome['shards_url']}"
    if None in outcome["sample_shape"]:
        use += (
            " --set data.resolution=64"
            if outcome["modality"] == "image"
            else (" --set data.length=N")
        )
    yield "done", {"message": message, "rows": {"left out": skipped, "use it": use}}


def verifying(url: str, num_shards: int, num_bytes: int) -> Iterator[Event]:
    """What is said before a data set is verified."""
    shards = f"{plural(num_shards, 'shard')}, {size(num_bytes)}"
    message = f"verifying {shown_path(url)}: {shards}"
    yield "start", {"message": message, "total": num_bytes, "unit": "bytes"}


def verified(outcome: Facts) -> Iterator[Event]:
    """What is said when all is verified."""
    for subject, problem in outcome["damaged"][:_DAMAGE_SHOWN]:
        yield "warning", {"message": f"{subject} {problem}"}
    if (more := len(outcome["damaged"]) - _DAMAGE_SHOWN) > 0:
        yield "warning", {"message": f"and {count(more)} more"}
    what = "no damage" if outcome["whole"] else plural(len(outcome["damaged"]), "damage")
    counted = ", ".join(plural(outcome[k], k.removesuffix("s")) for k in _COUNTED if k in outcome)
    yield (
        "done",
        {"message": f"after {duration(outcome['seconds'])}: {what} in {counted}", "rows": {}},
    )


_DAMAGE_SHOWN = 100
_COUNTED = ("checkpoints", "shards", "samples")


def shards_of(plan: Facts) -> str:
    """The folder of the shards, as a begin."""
    return f"{shown_path(plan['source'])}, "
