"""Parquet files with a column of bytes or texts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gatdist.common.errors import DataError
from gatdist.common.strict_json import parse_json
from gatdist.packing.entries import (
    MODALITY,
    Entry,
    Listing,
    Part,
    Selection,
    Skipped,
    Span,
    each_readable,
)
from gatdist.packing.sources.files import extension_of, open_file
from gatdist.packing.sources.tables import (
    ROWS_PROBED,
    Columns,
    Row,
    choose_columns,
    list_rows,
    modalities,
    part_of,
)
from gatdist.storage import Store

_ROWS_AT_ONCE = 256


def list_parquet(store: Store, names: Sequence[str], selection: Selection, spool: Store) -> Listing:
    """List a sample for each row: bytes, a text, or the path or URL of a file.

    Parquet is compressed by columns, so that a row can't be read alone: bytes are copied once into
    the folder ``spool``.
    """
    listing = Listing(store, [], [])
    entries: list[Entry] = []
    used: list[Columns] = []

    def add(name: str) -> None:
        with _opened(store, name) as table:
            if not table.metadata.num_rows:
                return
            rows: list[Row] = [dict.fromkeys(table.schema_arrow.names)]
            requested = [*selection.fields.values()] or [selection.column or ""]
            if texts := [column for column in requested if _holds_text(table, column)]:
                rows += islice(_rows(table, texts), ROWS_PROBED)
            columns = choose_columns(rows, selection, f"{store.url}/{name}")
            used.append(columns)
            listing.class_names = listing.class_names or _class_names(table, columns.label)
            if all(_holds_text(table, column.name) for column in columns.fields):
                part = list_rows(store, name, _rows(table, _names(columns)), selection)
                entries.extend(part.entries)
                listing.skipped += part.skipped
            else:
                entries.extend(_spooled(store, name, table, columns, spool, listing.skipped))

    each_readable(names, add, listing.skipped)
    listing.entries = entries
    listing.modalities = modalities(used[0], entries) if used else ["image"]
    return listing


@contextmanager
def _opened(store: Store, name: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(name, f"needs pyarrow ({error})", hint="pip install pyarrow") from None
    try:
        with open_file(store, name) as file:
            yield pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        subject = f"{store.url}/{name}"
        raise DataError(subject, f"is not a readable Parquet file ({error})") from None


def _holds_text(table: Any, column: str) -> bool:
    from pyarrow import types

    if column not in table.schema_arrow.names:
        return False
    kind = table.schema_arrow.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _names(columns: Columns) -> list[str]:
    names = [*(column.name for column in columns.fields), columns.label, columns.caption]
    return [name for name in names if name]


def _rows(table: Any, columns: Sequence[str]) -> Iterator[Row]:
    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
        yield from batch.to_pylist()


def _spooled(
    store: Store, name: str, table: Any, columns: Columns, spool: Store, skipped: list[Skipped]
) -> Iterator[Entry]:
    settings = [name, store.size(name), *columns]
    stem = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if not spool.exists(f"{stem}.json"):  # written last
        texts = {column for column in _names(columns) if _holds_text(table, column)}
        with tempfile.TemporaryDirectory(prefix="gatdist-pack-") as folder:
            path = Path(folder, stem)
            with path.open("wb") as copy:
                given = _rows(table, _names(columns))
                rows = [_copied(row, columns, texts, copy) for row in given]
            spool.publish_file(f"{stem}.bin", path)
        spool.publish(f"{stem}.json", json.dumps(rows, default=_plain).encode())
    file = f"{spool.url}/{stem}.bin"
    for number, (entry, problem) in enumerate(json.loads(spool.read(f"{stem}.json"))):
        where = f"{name}:{number}"
        if problem:
            skipped.append((where, problem))
            continue
        found = Entry.from_json([where, *entry])
        yield found._replace(fields=tuple(_in(part, file) for part in found.fields))


def _in(part: Part, file: str) -> Part:
    """A part that is in ``file``, unless in a file of its own."""
    span = part.content
    if isinstance(span, str) or span.file:
        return part
    return part._replace(content=span._replace(file=file))


def _copied(
    row: Row, columns: Columns, texts: Container[str], copy: BinaryIO
) -> tuple[tuple[Any, ...], str]:
    """Append a row's bytes to ``copy``; return an entry without its name, and the problem."""
    parts, problem = [], ""
    for column in columns.fields:
        part = part_of(row, column) if column.name in texts else _appended(row[column.name], copy)
        if isinstance(part, Part):
            parts.append(part)
        elif not problem:
            problem = part if len(columns.fields) == 1 else f"{part} (column {column.name})"
    label = row[columns.label] if columns.label else None
    text = row[columns.caption] if columns.caption else None
    others = () if text is None else (Part("txt", _plain(text)),)
    return (parts, label, others), problem


def _appended(value: Any, copy: BinaryIO) -> Part | str:
    component, content, problem = _content(value)
    if problem:
        return problem
    start = copy.tell()
    copy.write(content)
    stop = copy.tell()
    return Part(component, Span("", start, stop, stop - start))


def _plain(value: Any) -> str:
    """Convert a label or text of a type that JSON lacks: bytes, decimals, dates."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _content(value: Any) -> tuple[str, bytes, str]:
    path = ""
    if isinstance(value, dict):  # as Hugging Face's datasets store images and audio
        path, value = value.get("path") or "", value.get("bytes")
    if not isinstance(value, bytes) or not value:
        return "", b"", "holds no bytes"
    component = sniffed(value)
    if not component and extension_of(path) in MODALITY:
        component = extension_of(path)
    return component, value, "" if component else "is not an image, audio or an array"


def sniffed(content: bytes) -> str:
    """Return the extension for the magic bytes of ``content``; "" if unknown."""
    if content.startswith(b"RIFF"):
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(content[8:12], "")
    for magic, component in _MAGIC:
        if content.startswith(magic):
            return component
    return ""


_MAGIC = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp")),
    *((b"P5", "pgm"), (b"P6", "ppm"), (b"fLaC", "flac"), (b"OggS", "ogg")),
    (b"\x93NUMPY", "npy"),
)


def _class_names(table: Any, label: str | None) -> list[str] | None:
    try:
        features = parse_json(table.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]
