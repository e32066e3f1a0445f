"""Text files with one sample a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gatdist.packing.entries import Entry, Listing, Span
from gatdist.packing.ranges import open_file
from gatdist.storage import Store

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_lines(store: Store, names: Sequence[str]) -> Listing:
    """A sample for each line that is not blank, without its end; all files are read through."""
    entries = [entry for name in names for entry in _lines(store, name)]
    return Listing(store, "text", entries)


def _lines(store: Store, name: str) -> Iterator[Entry]:
    start = 0
    with open_file(store, name) as file:
        for number, line in enumerate(file, 1):
            begin = start + (len(_BYTE_ORDER_MARK) if line.startswith(_BYTE_ORDER_MARK) else 0)
            end = start + len(line.rstrip(b"\r\n"))
            if line[begin - start : end - start].strip():
                yield Entry(f"{name}:{number}", "txt", Span(name, begin, end, end - begin))
            start += len(line)
