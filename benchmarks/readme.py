"""Writes the table of results in README.md from the records in ``benchmarks/results``.

python -m benchmarks.readme [--check]

It stands between two marks. With ``--check`` nothing is written, and the exit status is 1 if the
table is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from benchmarks.records import RESULTS, Record, newest

README = RESULTS.parents[1] / "README.md"
BEGIN = "<!-- results: written by `python -m benchmarks.readme` -->"
END = "<!-- end of results -->"
NOTES = """\
FID and JSD: Fréchet distance and divergence of n-grams to the real data; halves: of two halves of
them; baseline: of the mean picture, of sounds with shuffled frames, or of a Markov chain. After a
commit, +: with changes; r: the one that recorded it, where the record names none. Versions are in
each record.
"""
QUALITY = ("digits", "digits-conditional", "glyphs", "glyphs-r3gan", "glyphs-stylegan2")
QUALITY += ("ring", "speech", "words", "quality_digits", "quality_glyphs")
SPEED = ("step", "gpu", "using", "data", "storage", "scaling", "startup", "recovery", "soak")


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it is stale")
    arguments = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = with_results(before, newest())
    if arguments.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


def with_results(text: str, records: Sequence[Record]) -> str:
    """The text with the table of these records between its marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README}: has no lines `{BEGIN}` and `{END}`")
    return f"{head}{BEGIN}\n{''.join(_tables(records))}{END}{tail}"


def _tables(records: Sequence[Record]) -> Iterator[str]:
    by_name = {record.name: record for record in records}
    for title, spread, names in (
        ("What runs reach", "spread", QUALITY),
        ("How fast it is", "lowest to highest", SPEED),
    ):
        yield f"\n| {title} | | {spread} | measured |\n| --- | --- | --- | --- |\n"
        for name in names:
            if name in by_name:
                yield from _rows(by_name[name])
    yield f"\n{NOTES}\n"


def _rows(record: Record) -> Iterator[str]:
    """A record's lines; where and on what it was made stands beside the first."""
    made = f"[{record.date}](benchmarks/results/{record.folder.name}), {record.made_on}"
    for line in record.lines():
        yield f"| {line.what} | {line.value} | {line.spread} | {made} |\n"
        made = "″"


if __name__ == "__main__":
    sys.exit(main())
