"""Console events of ``pack``, ``index`` and ``verify``, from plans and outcomes in JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gatdist.monitor.console import shown_path
from gatdist.monitor.numbers import count, duration, number, percent, plural, size

Values = Mapping[str, Any]
Event = tuple[str, Values]

_NOUNS = {
    "image": "image",
    "audio": "audio file",
    "text": "text",
    "points": "array",
    "tokens": "token sequence",
}
_PACKED_AS = {
    "upscaled": "smaller than --size and upscaled",
    "transparent": "transparent and composited on the background",
    "profiles": "converted from another color profile to sRGB",
    "damaged_profiles": "read as sRGB because the color profile is damaged",
    "reduced": "of more than 8 bits per channel and reduced to 8 (--bits 16 keeps 16)",
    "animated": "of several frames or pages, of which the first was taken",
}
_READ_AS = {
    "transparent": "stored with an alpha channel, which reading composites on white",
    "profiles": "stored with another color profile, which reading converts to sRGB",
    "damaged_profiles": "stored with a damaged color profile, and are read as sRGB",
    "reduced": "stored with 16 bits per channel, of which 8 are read (--bits 16 reads all)",
    "animated": "stored with several frames or pages, of which the first is read",
}
_CLASSES_SHOWN = 4
_DAMAGE_SHOWN = 100


def packing(plan: Values) -> Iterator[Event]:
    """Events before packing: what was found and what will be written."""
    yield "note", {"message": _found(plan)}
    for note in plan["notes"]:
        yield "warning", {"message": note}
    message, unit = f"packing {_target(plan)}", f"{_noun(plan)}s"
    yield "work", {"message": message, "total": plan["samples"], "unit": unit}


def packed(outcome: Values) -> Iterator[Event]:
    """Events after packing."""
    packed_as = dict(_PACKED_AS)
    if outcome["modality"] == "audio":
        packed_as["upscaled"] = "shorter than requested and padded with silence"
    yield from _remarks(outcome, packed_as)
    if empty := outcome["empty_classes"]:
        names = ", ".join(outcome["empty_class_examples"])
        more = ", …" if empty > len(outcome["empty_class_examples"]) else ""
        verb = "has" if empty == 1 else "have"
        message = f"{plural(empty, 'class', 'classes')} {verb} no sample: {names}{more}"
        yield "warning", {"message": message}
    details = size(outcome["bytes"])
    if outcome["samples_per_s"]:
        details += f", {number(outcome['samples_per_s'])}/s"
    yield _summary(outcome, details, "")


def described(plan: Values) -> str:
    """The text of a dry run."""
    lines = [_found(plan), *plan["notes"], f"would pack {_target(plan)}"]
    if plan["skipped"]:
        lines.append(f"skipped by name: {plural(plan['skipped'], 'file')}, such as")
        lines += [f"  {name} {reason}" for name, reason in plan["skipped_examples"]]
    return "\n".join(lines)


def indexing(plan: Values) -> Iterator[Event]:
    """Events before indexing."""
    labels = f"labels from {plan['label']}" if plan["label"] else "without labels"
    message = f"indexing {_noun(plan)}s, {labels}: {shown_path(plan['source'])}, "
    message += f"{plural(plan['shards'], 'shard')}, {size(plan['bytes'])}"
    yield "work", {"message": message, "total": plan["bytes"], "unit": "bytes"}


def indexed(outcome: Values) -> Iterator[Event]:
    """Events after indexing."""
    yield from _remarks(outcome, _READ_AS)
    options = ""
    if outcome["shards_url"]:
        options = f" --set data.shards_url={outcome['shards_url']}"
    for modality in outcome["varying"]:
        options += f" --set data.{'resolution=64' if modality == 'image' else 'length=N'}"
    classes = plural(n, "class", "classes") if (n := outcome["num_classes"]) else ""
    yield _summary(outcome, classes, options)


def verifying(url: str, num_shards: int, num_bytes: int) -> Event:
    """The event before a data set is verified."""
    message = f"verifying {shown_path(url)}: {plural(num_shards, 'shard')}, {size(num_bytes)}"
    return "work", {"message": message, "total": num_bytes, "unit": "bytes"}


def verified(outcome: Values) -> Iterator[Event]:
    """Events after verifying."""
    damaged = outcome["damaged"]
    for subject, problem in damaged[:_DAMAGE_SHOWN]:
        yield "warning", {"message": f"{subject} {problem}"}
    if (more := len(damaged) - _DAMAGE_SHOWN) > 0:
        yield "warning", {"message": f"and {count(more)} more"}
    found = plural(len(damaged), "problem") if damaged else "no damage"
    kinds = [kind for kind in ("checkpoints", "shards", "samples") if kind in outcome]
    checked = ", ".join(plural(outcome[kind], kind.removesuffix("s")) for kind in kinds)
    message = f"after {duration(outcome['seconds'])}: {found} in {checked}"
    yield "summary", {"message": message, "rows": {}}


def _remarks(outcome: Values, meanings: Mapping[str, str]) -> Iterator[Event]:
    for kind, meaning in meanings.items():
        if number_of := outcome.get(kind):
            verb = "was" if number_of == 1 else "were"
            message = f"{plural(number_of, _noun(outcome))} {verb} {meaning}, such as"
            yield "warning", {"message": f"{message} {outcome[f'{kind}_example']}"}


def _summary(outcome: Values, details: str, options: str) -> Event:
    """The last event of packing and indexing; ``options`` are more options to train with."""
    message = f"after {duration(outcome['seconds'])}: {plural(outcome['samples'], 'sample')} in "
    message += plural(outcome["shards"], "shard") + (f", {details}" if details else "")
    skipped = ""
    if outcome["skipped"]:
        share = percent(outcome["skipped"] / (outcome["samples"] + outcome["skipped"]))
        report = shown_path(f"{outcome['url']}/{outcome['report']}")
        skipped = f"{count(outcome['skipped'])} ({share}), listed with reasons in {report}"
        for name, reason in outcome["skipped_examples"]:
            skipped += f"\n{'':12}{name} {reason}"
    use = f"--set data.url={shown_path(outcome['url'])}{options}"
    return "summary", {"message": message, "rows": {"skipped": skipped, "use it": use}}


def _noun(found: Values) -> str:
    return "sample" if len(found["fields"]) > 1 else _NOUNS[found["modality"]]


def _found(plan: Values) -> str:
    text = f"found in {shown_path(plan['source'])} ({plan['kind']}): "
    text += plural(plan["samples"], _noun(plan))
    if plan["num_classes"]:
        text += f", {plural(plan['num_classes'], 'class', 'classes')}"
        names = plan["class_names"]
        if names:
            more = ", …" if len(names) > _CLASSES_SHOWN else ""
            text += f" ({', '.join(names[:_CLASSES_SHOWN])}{more})"
    return text


def _target(plan: Values) -> str:
    formats = [
        f"{field['name']} {_format(field, plan['recipe'])}".strip() for field in plan["fields"]
    ]
    shards, each = plural(plan["shards"], "shard"), size(plan["bytes"] / plan["shards"])
    return f"{' and '.join(formats)} into {shards} of about {each}: {shown_path(plan['url'])}"


def _format(field: Values, recipe: Values) -> str:
    modality, shape = field["modality"], field["sample_shape"]
    if modality == "image":
        channels, height, width = shape
        how = "unchanged"
        if recipe["size"]:
            how = recipe["transform"] or "center-crop"
            if how != "center-crop-dhariwal":  # which has its own filters
                how += f", {recipe['filter'] or 'lanczos'}"
        color = "gray" if channels == 1 else "RGB"
        depth = ", 16 bits" if recipe["bits"] == 16 else ""
        return f"{height} × {width} {color}{depth} ({how})"
    if modality == "audio":
        channels, length = shape
        rate = field["sample_rate"]
        text = f"{length / rate:.2f} s at {count(rate)} Hz, {plural(channels, 'channel')} of "
        return f"{text}{count(length)} samples,"
    if modality == "text":
        return f"the first {count(*shape)} bytes of each"
    return f"{modality} of shape {' × '.join(map(str, shape))}"
