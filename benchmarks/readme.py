"""Write the tables of results in README.md and docs/results.md from ``benchmarks/results``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.case import RESULTS
from benchmarks.records import Record, newest

REPOSITORY = RESULTS.parents[1]
README = REPOSITORY / "README.md"
ALL_RESULTS = REPOSITORY / "docs" / "results.md"
BEGIN = "<!-- results: written by `python -m benchmarks.readme` -->"
END = "<!-- end of results -->"
QUALITY = (
    *("digits", "digits-conditional", "glyphs", "glyphs-r3gan", "glyphs-stylegan2"),
    *("ring", "modes", "speech", "words", "quality_digits", "quality_glyphs"),
)
SPEED = (
    *("step", "gpu", "using", "data", "storage", "scaling", "startup", "recovery", "after_loss"),
    *("undo", "soak", "scale"),
)
# Of the README: a record, and which of its lines.
HIGHLIGHTS = (("digits", 0), ("step", 0), ("data", 0), ("scaling", 1), ("soak", 0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    arguments = parser.parse_args()
    stale = False
    for page in (README, ALL_RESULTS):
        before = page.read_text(encoding="utf-8")
        after = with_results(page, before, newest())
        stale |= before != after
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
    return int(arguments.check and stale)


def with_results(page: Path, text: str, records: Sequence[Record]) -> str:
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: has no lines `{BEGIN}` and `{END}`")
    rows = _highlights(records) if page == README else _tables(records)
    return f"{head}{BEGIN}\n{''.join(rows)}\n{END}{tail}"


def _highlights(records: Sequence[Record]) -> Iterator[str]:
    by_name = {record.name: record for record in records}
    yield "\n| measurement | value and baseline | spread | record |\n| --- | --- | --- | --- |\n"
    for name, place in HIGHLIGHTS:
        record = by_name[name]
        line = record.lines()[place]
        link = f"[{record.date}](benchmarks/results/{record.folder.name})"
        yield f"| {line.what} | {line.value} | {line.spread} | {link} |\n"


def _tables(records: Sequence[Record]) -> Iterator[str]:
    by_name = {record.name: record for record in records}
    for title, spread, names in (
        ("Quality", "spread", QUALITY),
        ("Speed", "lowest to highest", SPEED),
    ):
        yield f"\n## {title}\n\n| measurement | value and baseline | {spread} | record |\n"
        yield "| --- | --- | --- | --- |\n"
        for name in names:
            if name in by_name:
                yield from _rows(by_name[name])


def _rows(record: Record) -> Iterator[str]:
    made = f"[{record.date}](../benchmarks/results/{record.folder.name}), {record.made_on}"
    for line in record.lines():
        yield f"| {line.what} | {line.value} | {line.spread} | {made} |\n"
        made = "″"


if __name__ == "__main__":
    sys.exit(main())
