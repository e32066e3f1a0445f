"""Console events of ``apply``, from its plan and outcome in JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gatdist.monitor.console import shown_path
from gatdist.monitor.numbers import count, duration, number, plural

Values = Mapping[str, Any]
Event = tuple[str, Values]


def applying(plan: Values) -> Iterator[Event]:
    """Events before the work."""
    for note in plan["notes"]:
        yield "warning", {"message": note}
    generator = f"{shown_path(plan['run'])} at {count(plan['samples_seen'])} samples"
    message = f"applying {generator} to {plural(plan['files'], 'file')} ({plan['field']}): "
    message += f"{shown_path(plan['source'])} into {shown_path(plan['url'])}"
    yield "work", {"message": message, "total": plan["files"], "unit": "files"}
    if plan["found"]:
        yield "progress", {"done": 0, "found": plan["found"]}


def applied(outcome: Values) -> Iterator[Event]:
    """Events after the work."""
    message = f"after {duration(outcome['seconds'])}: {plural(outcome['written'], 'file')} written"
    if outcome["found"]:
        message += f", {count(outcome['found'])} were there"
    if outcome["files_per_s"]:
        message += f", {number(outcome['files_per_s'])}/s"
    skipped = ""
    if outcome["skipped"]:
        report = shown_path(f"{outcome['url']}/{outcome['report']}")
        skipped = f"{count(outcome['skipped'])}, listed with reasons in {report}"
        for name, reason in outcome["skipped_examples"]:
            skipped += f"\n{'':12}{name} {reason}"
    rows = {"skipped": skipped, "outputs": shown_path(outcome["url"])}
    yield "summary", {"message": message, "rows": rows}
