"""What a source holds, known without reading its images, audio or texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from gatdist.common.errors import DataError
from gatdist.data.codecs.formats import IMAGE_COMPONENTS
from gatdist.storage import Store

# A class as the source has it; see :func:`~gatdist.data.codecs.labels.normalized`.
Label = Any
# A part of a source that is not packed, and the reason: ("cats/7.jpg", "is not a readable image").
Skipped = tuple[str, str]

_MAX_NAMED = 10
T = TypeVar("T")

# Modality of a file by its extension.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "image": IMAGE_COMPONENTS,
    "audio": ("wav", "flac", "ogg"),
    "text": ("txt",),
    "array": ("npy",),
}
MODALITY = {component: modality for modality, names in COMPONENTS.items() for component in names}


def printable(name: str) -> str:
    """Escape what is not UTF-8 in a name, which Python keeps as surrogates."""
    return name.encode(errors="backslashreplace").decode()


def all_named(skipped: Sequence[Skipped], hint: str = "") -> DataError:
    """Return an error that names the first ten, and the number of the others."""
    named = [
        f"{printable(name)}: {reason}" if reason else name for name, reason in skipped[:_MAX_NAMED]
    ]
    if len(skipped) > _MAX_NAMED:
        named.append(f"and {len(skipped) - _MAX_NAMED:,} more")
    message = "; ".join(line.rstrip(".") for line in named)
    subject, _, rule = message.partition(": ")
    return DataError(subject, rule, hint=hint)


def each_readable(
    names: Sequence[str], read: Callable[[str], T], skipped: list[Skipped]
) -> dict[str, T]:
    """Return ``read(name)`` by name, unless damaged; raise DataError if all are damaged."""
    found, damaged = {}, []
    for name in names:
        try:
            found[name] = read(name)
        except DataError as error:
            damaged.append((name, str(error)))
    if not found:
        raise all_named([(error, "") for _, error in damaged])
    skipped += damaged
    return found


class Zipped(NamedTuple):
    """A zip member's entry in the directory. Sizes in bytes."""

    method: int
    size: int
    crc32: int
    name_crc32: int


class Span(NamedTuple):
    """A range of bytes."""

    file: str  # a name in the source's folder, an absolute path, or a URL
    start: int = 0
    stop: int | None = None  # None: the end of the file
    size: int | None = None  # of the uncompressed content; None if unknown before reading
    zipped: Zipped | None = None  # of a member of a zip, whose local header is at ``start``


class Part(NamedTuple):
    """A file of a sample."""

    component: str  # extension in lower case
    content: Span | str  # where its bytes are, or a text itself


class Entry(NamedTuple):
    """One sample of a source, or a recording of several."""

    name: str  # unique in the source: ``cats/1.jpg``, ``train.parquet:17``
    fields: tuple[Part, ...]  # one for each field; that of the generated field is the first
    label: Label = None  # a number, a name, or None
    others: tuple[Part, ...] = ()  # more files, such as a caption

    @property
    def files(self) -> tuple[Part, ...]:
        return *self.fields, *self.others

    @property
    def size(self) -> int | None:
        """Bytes of all its files; None if unknown before reading."""
        contents = [part.content for part in self.files]
        sizes = [len(c.encode()) if isinstance(c, str) else c.size for c in contents]
        return None if None in sizes else sum(size for size in sizes if size)

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Entry:
        name, fields, label, others = values
        return cls(name, _parts(fields), label, _parts(others))


def _parts(values: Sequence[Any]) -> tuple[Part, ...]:
    return tuple(Part(component, _content(content)) for component, content in values)


def _content(value: Any) -> Span | str:
    if isinstance(value, str):
        return value
    file, start, stop, size, zipped = value
    return Span(file, start, stop, size, Zipped(*zipped) if zipped else None)


@dataclass
class Listing:
    """All that a source holds."""

    store: Store  # the folder that names of files are relative to
    modalities: Sequence[str]  # of each field: ``image``, ``audio``, ``text`` or ``array``
    entries: Sequence[Entry]
    class_names: Sequence[str] | None = None  # of labels that are numbers
    skipped: list[Skipped] = field(default_factory=list)
    ignored: list[Skipped] = field(default_factory=list)  # files of operating systems and tools
    notes: list[str] = field(default_factory=list)  # warnings


@dataclass(frozen=True)
class Selection:
    """How to read a source; None detects it."""

    kind: str | None = None  # see :data:`~gatdist.packing.sources.KINDS`
    labels: str | None = None  # none, folders, a column, a field of .json, or a CSV or JSON file
    column: str | None = None  # of a table, the one that holds the samples
    # Where the files of each field are, by name; that of the generated field is the first.
    fields: Mapping[str, str] = field(default_factory=dict)
