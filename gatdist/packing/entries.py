"""What a source holds, known without reading its pictures, sounds or texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from gatdist.common.errors import DataError
from gatdist.data.codecs import IMAGE_COMPONENTS
from gatdist.storage import Store

# A class as the source has it; see :func:`~gatdist.data.codecs.labels.normalized`.
Label = Any
# Something of a source that is not packed, and why: ("cats/7.jpg", "is no readable JPEG").
Skipped = tuple[str, str]

_MOST_NAMED = 10
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
    """A name as it is told: what is not UTF-8 in it, which Python keeps as surrogates, escaped."""
    return name.encode(errors="backslashreplace").decode()


def all_named(skipped: Sequence[Skipped], hint: str = "") -> DataError:
    """An error that names all, or the first ten and how many more there are."""
    named = [
        f"{printable(name)}: {reason}" if reason else name for name, reason in skipped[:_MOST_NAMED]
    ]
    if len(skipped) > _MOST_NAMED:
        named.append(f"and {len(skipped) - _MOST_NAMED:,} more")
    message = "; ".join(line.rstrip(".") for line in named)
    subject, _, rule = message.partition(": ")
    return DataError(subject, rule, hint=hint)


def each_readable(
    names: Sequence[str], read: Callable[[str], T], skipped: list[Skipped]
) -> dict[str, T]:
    """What ``read`` gives for each file, without those that are damaged.

    Raises:
        DataError: all of them are; names the first ones.
    """
    found, damaged = {}, []
    for name in names:
        try:
            found[name] = read(name)
        except DataError as error:
            damaged.append((name, error))
    if not found:
        raise all_named([(str(error), "") for _, error in damaged])
    skipped += [(name, str(error)) for name, error in damaged]
    return found


class Zipped(NamedTuple):
    """What a zip's directory says of a member. Sizes in bytes; the name by its CRC-32."""

    method: int
    size: int
    crc32: int
    name_crc32: int


class Span(NamedTuple):
    """Where some bytes are.

    Attributes:
        file: a name in the source's folder, an absolute path, or a URL.
        start: the first byte.
        stop: the byte after the last; None for the file's end.
        size: how many bytes come out; None where nobody knows before reading.
        zipped: set for a member of a zip, whose own header stands at ``start``.
    """

    file: str
    start: int = 0
    stop: int | None = None
    size: int | None = None
    zipped: Zipped | None = None


class Entry(NamedTuple):
    """One sample of a source.

    Attributes:
        name: what people know it by, unique in the source: ``cats/1.jpg``, ``train.parquet:17``.
        component: its extension in lower case, such as ``jpg``.
        content: where its bytes are, or a text itself.
        label: its class: a number, a name, or None.
        others: more files of the sample, by extension: ``(("txt", "a cat"),)``.
    """

    name: str
    component: str
    content: Span | str
    label: Label = None
    others: tuple[tuple[str, Span | str], ...] = ()

    @property
    def size(self) -> int | None:
        """Bytes of all its files; None where nobody knows before reading."""
        sizes = [_size(self.content), *(_size(content) for _, content in self.others)]
        return None if None in sizes else sum(size for size in sizes if size)

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Entry:
        """The entry that JSON made a list of."""
        name, component, content, label, others = values
        pairs = tuple((component, _content(part)) for component, part in others)
        return cls(name, component, _content(content), label, pairs)


def _size(content: Span | str) -> int | None:
    return len(content.encode()) if isinstance(content, str) else content.size


def _content(value: Any) -> Span | str:
    if isinstance(value, str):
        return value
    file, start, stop, size, zipped = value
    return Span(file, start, stop, size, Zipped(*zipped) if zipped else None)


@dataclass
class Listing:
    """All that a source holds.

    Attributes:
        store: the folder that names of files are relative to.
        modality: ``image``, ``audio``, ``text`` or ``array``.
        entries: the samples, in any order.
        class_names: of labels that are numbers already, where the source tells.
        skipped: what is no sample, with the reason.
        ignored: files of operating systems and tools, with the reason.
        notes: what the user should know, as sentences.
    """

    store: Store
    modality: str
    entries: Sequence[Entry]
    class_names: Sequence[str] | None = None
    skipped: list[Skipped] = field(default_factory=list)
    ignored: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """How to read a source; None detects it.

    Attributes:
        kind: see :data:`~gatdist.packing.sources.KINDS`.
        labels: ``none``, ``folders``, a column of a table, a field of WebDataset's ``.json``, or
            the path of a CSV or JSON file that names each file's class.
        column: of a table, the one that holds the samples.
    """

    kind: str | None = None
    labels: str | None = None
    column: str | None = None
