"""What a packing tells people, from facts that are JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gatdist.monitor.console import shown_path
from gatdist.monitor.numbers import count, duration, number, percent, size

Facts = Mapping[str, Any]
# Kind and fields, as :mod:`gatdist.monitor.progress` shows them.
Event = tuple[str, Facts]

_NOUNS = {"image": "picture", "audio": "sound", "text": "text"}
# What becomes of those that are smaller than asked.
_BECAME = {
    "image": "smaller than asked and enlarged",
    "audio": "shorter than asked and filled up with silence",
}
_REMARKS = {
    "transparent": "transparent and composited on the background",
    "profiles": "converted from another color profile to sRGB",
    "damaged_profiles": "taken for sRGB because the color profile is damaged",
    "reduced": "of more than 8 bits per channel and reduced to 8 (--bits 16 keeps 16)",
    "animated": "of several frames or pages, of which the first was taken",
}
_NAMES_SHOWN = 4


def opening(plan: Facts) -> Iterator[Event]:
    """What is said before the work begins: what was found, and what will be made of it."""
    yield "note", {"message": _found(plan)}
    for note in plan["notes"]:
        yield "warning", {"message": note}
    yield (
        "start",
        {
            "message": f"packing {_aim(plan)}",
            "total": plan["samples"],
            "unit": f"{_noun(plan)}s",
        },
    )


def closing(outcome: Facts) -> Iterator[Event]:
    """What is said at the end."""
    yield from remarks(outcome, {"upscaled": _BECAME.get(outcome["modality"], "")} | _REMARKS)
    if number_of := outcome["empty_classes"]:
        verb = "has" if number_of == 1 else "have"
        examples = ", ".join(outcome["empty_class_examples"])
        more = ", …" if number_of > len(outcome["empty_class_examples"]) else ""
        rule = f"{plural(number_of, 'class', 'classes')} {verb} no sample: {examples}{more}"
        yield "warning", {"message": rule}
    total = outcome["samples"] + outcome["skipped"]
    message = f"after {duration(outcome['seconds'])}: {plural(outcome['samples'], 'sample')} in "
    message += f"{plural(outcome['shards'], 'shard')}, {size(outcome['bytes'])}"
    if outcome["samples_per_s"]:
        message += f", {number(outcome['samples_per_s'])}/s"
    skipped = ""
    if outcome["skipped"]:
        share = percent(outcome["skipped"] / total)
        report = shown_path(f"{outcome['url']}/{outcome['report']}")
        skipped = f"{count(outcome['skipped'])} ({share}), each with the reason in {report}"
        for name, reason in outcome["skipped_examples"]:
            skipped += f"\n{'':12}{name} {reason}"
    rows = {"left out": skipped, "use it": f"--set data.url={shown_path(outcome['url'])}"}
    yield "done", {"message": message, "rows": rows}


def remarks(outcome: Facts, became: Mapping[str, str]) -> Iterator[Event]:
    """A warning for each kind of remark that was counted: ``became`` says what they are."""
    for kind, what in became.items():
        if number_of := outcome[kind]:
            verb = "was" if number_of == 1 else "were"
            rule = f"{plural(number_of, _noun(outcome))} {verb} {what}, such as"
            yield "warning", {"message": f"{rule} {outcome[f'{kind}_example']}"}


def described(plan: Facts) -> str:
    """What a dry run says."""
    lines = [_found(plan), *plan["notes"], f"would pack {_aim(plan)}"]
    if plan["skipped"]:
        lines.append(f"left out, before any is read: {plural(plan['skipped'], 'file')}, such as")
        lines += [f"  {name} {reason}" for name, reason in plan["skipped_examples"]]
    return "\n".join(lines)


def _found(plan: Facts) -> str:
    facts = [plural(plan["samples"], _noun(plan))]
    if plan["num_classes"]:
        names = plan["class_names"]
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
        classes = plural(plan["num_classes"], "class", "classes")
        facts.append(f"{classes} ({shown})" if names else classes)
    return f"found in {shown_path(plan['source'])} ({plan['kind']}): {', '.join(facts)}"


def _aim(plan: Facts) -> str:
    if plan["modality"] == "image":
        channels, height, width = plan["sample_shape"]
        color = "gray" if channels == 1 else "RGB"
        recipe = plan["recipe"]
        how = "as they are"
        if recipe["size"]:
            filters = recipe["filter"] or "lanczos"
            own = recipe["transform"] == "center-crop-dhariwal"
            how = (recipe["transform"] or "center-crop") + ("" if own else f", {filters}")
        depth = " of 16 bits" if recipe["bits"] == 16 else ""
        aim = f"{height} × {width} {color}{depth} ({how})"
    elif plan["modality"] == "audio":
        channels, length = plan["sample_shape"]
        rate = plan["recipe"]["sample_rate"]
        seconds = f"{length / rate:.2f} s at {count(rate)} Hz"
        aim = f"{seconds}, {plural(channels, 'channel')} of {count(length)} samples,"
    elif plan["modality"] == "text":
        aim = f"the first {count(*plan['sample_shape'])} bytes of each"
    else:
        aim = f"{plan['modality']} of shape {' × '.join(map(str, plan['sample_shape']))}"
    shards = plural(plan["shards"], "shard")
    each = size(plan["bytes"] / plan["shards"])
    return f"{aim} into {shards} of about {each}: {shown_path(plan['url'])}"


def _noun(plan: Facts) -> str:
    return _NOUNS.get(plan["modality"], "sample")


def plural(value: int, noun: str, nouns: str = "") -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count(value)} {noun if value == 1 else nouns or noun + 's'}"
