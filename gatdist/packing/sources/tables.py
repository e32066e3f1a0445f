"""Lists of files or texts: CSV, TSV, JSON and JSON lines; and texts with one sample per line."""

from __future__ import annotations

import csv
import io
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from gatdist.common.errors import DataError, nearest
from gatdist.common.strict_json import parse_json
from gatdist.config import unicode_encoding
from gatdist.packing.entries import MODALITY, Entry, Label, Listing, Part, Selection, Skipped, Span
from gatdist.packing.sources.files import extension_of, open_file, plain_path
from gatdist.storage import Store

EXTENSIONS = ("csv", "tsv", "jsonl", "ndjson", "json")

# Usual names of columns, the most certain first.
CONTENT_COLUMNS = (
    *("image", "audio", "path", "file", "file_name", "filename", "file_path", "filepath"),
    *("image_path", "audio_path", "url", "uri", "image_url", "audio_url"),
)
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "class_id", "class_name")
TEXT_COLUMNS = ("text", "caption", "sentence", "txt")

_KNOWN_COLUMNS = {*CONTENT_COLUMNS, *LABEL_COLUMNS, *TEXT_COLUMNS}
_DELIMITERS = (",", ";", "\t", "|")
ROWS_PROBED = 64
_LONGEST_FIELD_BYTES = 64 * 2**20

Row = Mapping[str, Any]
T = TypeVar("T")


def is_list(name: str) -> bool:
    """Return whether a file is a list, by its extension."""
    return extension_of(name) in EXTENSIONS


def list_rows(store: Store, name: str, rows: Iterator[Row], selection: Selection) -> Listing:
    """List what the rows of a list name: files relative to its folder, URLs, or texts."""
    first = list(islice(rows, ROWS_PROBED))
    if not first:
        raise DataError(f"{store.url}/{name}", "is empty", hint="Name at least one file in it")
    columns = choose_columns(first, selection, f"{store.url}/{name}")
    listing = Listing(store, [], [])
    listing.entries = list(_entries(chain(first, rows), columns, name, listing.skipped))
    listing.modalities = modalities(columns, listing.entries)
    return listing


class Column(NamedTuple):
    """A column with one field of the samples."""

    name: str
    is_text: bool = False  # texts, instead of files or their bytes


class Columns(NamedTuple):
    """The columns that are used, None if absent."""

    fields: tuple[Column, ...]
    label: str | None
    caption: str | None  # texts about the samples


def choose_columns(rows: Sequence[Row], selection: Selection, table: str) -> Columns:
    """Choose columns by the user's selection, or else by their names.

    A selected column holds texts if most of its values in ``rows``, the first ones, are not files.
    Messages call the table ``table``. DataError without a column of that name or of samples.
    """
    names = list(filter(None, rows[0]))  # None is the key of fields without a name in ``csv``
    known = {name.lower(): name for name in names}

    def usual(candidates: Sequence[str]) -> str | None:
        return next((known[name] for name in candidates if name in known), None)

    def requested(option: str, name: str) -> str:
        if name in names:
            return name
        rule = f"{table} has no such column, but {', '.join(names)}. {nearest(name, names)}"
        raise DataError(option, rule, value=name)

    def column(option: str, name: str) -> Column:
        values = [row.get(requested(option, name)) for row in rows]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        return Column(name, 2 * sum(map(_is_file, texts)) < len(texts))

    if selection.fields:
        fields = [column("--field", name) for name in selection.fields.values()]
    elif selection.column:
        fields = [column("--column", selection.column)]
    else:
        fields = [Column(name) for name in [usual(CONTENT_COLUMNS)] if name]
    for field in fields:
        known.pop(field.name.lower(), None)
    caption = None if any(field.is_text for field in fields) else usual(TEXT_COLUMNS)
    if not fields and caption:
        fields, caption = [Column(caption, is_text=True)], None
    if not fields:
        rule = f"no column is named like a file or a text, they are {', '.join(names)}"
        hint = "Name the columns in the first line, or choose one with --column NAME"
        raise DataError(table, rule, hint=hint)
    if selection.labels in ("none", "folders"):
        label = None
    else:
        label = (
            requested("--labels", selection.labels) if selection.labels else usual(LABEL_COLUMNS)
        )
    return Columns(tuple(fields), label, caption)


def modalities(columns: Columns, entries: Sequence[Entry]) -> list[str]:
    """Return the modality of each field of a table."""
    return [
        "text" if column.is_text else majority(entry.fields[i].component for entry in entries)
        for i, column in enumerate(columns.fields)
    ]


def _is_file(value: str) -> bool:
    return "://" in value or extension_of(file_path(value)) in MODALITY


def read_table(store: Store, name: str, use: Callable[[Iterator[Row]], T]) -> T:
    """Return ``use`` of the rows of a list, as mappings from column to value.

    A ``dataset.json`` of the StyleGAN tools has rows of ``file`` and ``label``. Text is UTF-8,
    UTF-16 or UTF-32; a CSV file may also be Windows-1252, as spreadsheets write it in western
    Europe and America. DataError names the damaged line.
    """
    table = f"{store.url}/{name}"
    is_csv = extension_of(name) in ("csv", "tsv")
    with open_file(store, name) as file:
        encoding = unicode_encoding(file.read(4))
        for attempt in (encoding, "cp1252") if is_csv else (encoding,):
            file.seek(0)
            text = io.TextIOWrapper(file, encoding=attempt, newline="")
            try:
                return use(_rows_of(text, name, table))
            except UnicodeError as error:
                problem = f"is not UTF-8 text ({error})"
            finally:
                text.detach()
    hint = f"Save it as UTF-8, such as: iconv -f WINDOWS-1251 -t UTF-8 {name} > utf8-{name}"
    raise DataError(table, problem, hint=hint)


def _rows_of(text: io.TextIOWrapper, name: str, table: str) -> Iterator[Row]:
    extension = extension_of(name)
    if extension in ("csv", "tsv"):
        yield from _csv_rows(text, "\t" if extension == "tsv" else ",", table)
    elif extension == "json":
        yield from json_rows(text.read(), table)
    else:
        yield from _json_lines(text, table)


def _csv_rows(text: io.TextIOWrapper, usual: str, table: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD_BYTES)
    head = text.readline()
    delimiter = _delimiter(head, usual)
    lines: list[str] = []  # of the row that is being read
    rows = csv.DictReader(
        _kept(chain([head], text), lines), delimiter=delimiter, skipinitialspace=True
    )
    try:
        names = [name.strip() for name in rows.fieldnames or ()]
        if len(set(names)) < len(names):
            rule = f"two of its columns have one name: {', '.join(names)}"
            raise DataError(table, rule, hint="Give each column its own name")
        rows.fieldnames = names
        _require_closed(lines, delimiter, table, rows.line_num)
        for row in rows:
            _require_closed(lines, delimiter, table, rows.line_num)
            yield row
    except csv.Error as error:
        raise DataError(
            f"{table}:{rows.line_num}", f"is not a row of a CSV file ({error})"
        ) from None


def _kept(lines: Iterable[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        kept.append(line)
        yield line


def _require_closed(lines: list[str], delimiter: str, table: str, last: int) -> None:
    """Clear the lines of a row; raise DataError if it ends within quotation marks.

    For ``csv`` the end of the file closes them, so that all rows up to it are one field.
    """
    row = lines.copy()
    lines.clear()
    if sum(line.count('"') for line in row) % 2 == 0:
        return
    try:
        list(csv.reader(row, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            place = f"{table}:{last - len(row) + 1}"
            raise DataError(place, "opens a quotation mark that is never closed") from None


def _delimiter(head: str, usual: str) -> str:
    """The delimiter that gives most known names of columns, and then most names."""

    def found(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
        known = sum(name.strip().lower() in _KNOWN_COLUMNS for name in names)
        return known, len(names)

    return max((usual, *_DELIMITERS), key=found)


def json_rows(text: str, table: str) -> Iterator[Row]:
    """Yield the rows of a JSON list of objects, or of a StyleGAN ``dataset.json``."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(table, f"is not JSON ({error})") from None
    if isinstance(values, dict) and "labels" in values:
        pairs = values["labels"] or []
        if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
            raise DataError(table, 'must be {"labels": [[file, label], …]}')
        values = [dict(zip(("file", "label"), pair, strict=False)) for pair in pairs]
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        rule = 'must be a list of objects, or {"labels": [[file, label], …]}'
        raise DataError(table, rule)
    yield from values


def _json_lines(lines: Iterable[str], table: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{table}:{number}", f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{table}:{number}", "must be a JSON object", value=row)
        yield row


def _entries(
    rows: Iterable[Row], columns: Columns, name: str, skipped: list[Skipped]
) -> Iterator[Entry]:
    for number, row in enumerate(rows, 1):
        where = f"{name}:{number}"
        if None in row:  # the key of fields without a name in ``csv``
            skipped.append((where, "has more fields than the first line names"))
            continue
        parts = [part_of(row, column) for column in columns.fields]
        if wrong := next((part for part in parts if isinstance(part, str)), None):
            skipped.append((where, wrong))
            continue
        fields = tuple(part for part in parts if isinstance(part, Part))
        label: Label = row.get(columns.label) if columns.label else None
        text = row.get(columns.caption) if columns.caption else None
        others = (Part("txt", text),) if isinstance(text, str) and _is_text(text) else ()
        is_named = not any(column.is_text for column in columns.fields)
        files = " + ".join(str(row[column.name]) for column in columns.fields)
        yield Entry(files if is_named else where, fields, label, others)


def part_of(row: Row, column: Column) -> Part | str:
    """Return the file that a row names or the text that it holds, or why there is none."""
    value = row.get(column.name)
    if column.is_text:
        is_text = isinstance(value, str) and _is_text(value)
        return Part("txt", str(value)) if is_text else "has no text"
    if not isinstance(value, str) or not value.strip():
        return f"names no file in the column {column.name}"
    if not is_name(value):
        return "names a file with a lone surrogate"
    path = file_path(value)
    return Part(extension_of(path), Span(path))


def file_path(file: str) -> str:
    """Return the path of a file in a list, with ``/`` for Windows' separators."""
    file = file.strip()
    if "://" in file or file.startswith("/") or "\\" not in file:
        return file.removeprefix("./")
    return plain_path(file)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # JSON may hold lone surrogates
        return False


def is_name(name: str) -> bool:
    """Return whether it can be the name of a file: JSON may hold lone surrogates."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def majority(components: Iterable[str]) -> str:
    """Return the modality of most of these extensions; ``image`` if none is known."""
    counts = dict.fromkeys(("image", "audio", "text", "array"), 0)
    for component in components:
        if component in MODALITY:
            counts[MODALITY[component]] += 1
    return max(counts, key=lambda modality: counts[modality])


def list_lines(store: Store, names: Sequence[str]) -> Listing:
    """List each line of text files that is not blank, without its end."""
    entries = []
    for name in names:
        start = 0
        with open_file(store, name) as file:
            for number, line in enumerate(file, 1):
                begin = start + (len(BOM_UTF8) if line.startswith(BOM_UTF8) else 0)
                end = start + len(line.rstrip(b"\r\n"))
                if line[begin - start : end - start].strip():
                    span = Span(name, begin, end, end - begin)
                    entries.append(Entry(f"{name}:{number}", (Part("txt", span),)))
                start += len(line)
    return Listing(store, ["text"], entries)
