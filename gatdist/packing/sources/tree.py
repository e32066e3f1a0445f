"""Files in folders, on storage or in an archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.formats import UNSUPPORTED_IMAGES, unsupported_image
from gatdist.data.codecs.labels import normalized
from gatdist.packing.entries import (
    MODALITY,
    Entry,
    Label,
    Listing,
    Part,
    Selection,
    Skipped,
    Span,
    printable,
)
from gatdist.packing.labels import folder_classes, named
from gatdist.packing.sources.fields import complete, field_files
from gatdist.packing.sources.files import File, extension_of, plain_path, system_file
from gatdist.packing.sources.tables import (
    EXTENSIONS,
    Row,
    choose_columns,
    is_list,
    json_rows,
    read_table,
)
from gatdist.storage import Store

# The StyleGAN tools' list of labels, at the top of a folder or zip.
STYLEGAN_LABELS = "dataset.json"

_A_MODALITY = {"image": "an image", "audio": "audio", "text": "a text", "array": "an array"}


def list_tree(
    store: Store,
    files: Iterable[File],
    selection: Selection,
    read: Callable[[Span], bytes],
    skipped: Sequence[Skipped] = (),
    archive: str = "",
) -> Listing:
    """List a sample for each file of the commonest modality, or for each key of the fields.

    Args:
        store: the folder that spans are relative to.
        files: all of them.
        selection: how labels are found.
        read: reads a file of the tree, for ``dataset.json``.
        skipped: already.
        archive: its name, if all files are in one.
    """
    listing = Listing(store, [], [], skipped=list(skipped))
    seen = _usable(files, listing)
    lists = [name for name in seen if plain_path(name).rpartition("/")[2] == STYLEGAN_LABELS]
    if selection.labels:  # the list of labels may be among the files
        seen.pop(selection.labels.removeprefix(f"{store.url}/"), None)
    others = [name for name in seen if name not in lists]
    where = f"{store.url}/{archive}" if archive else store.url
    if selection.fields:
        files_of = field_files(others, selection.fields, listing)
        for field, keys in files_of.items():
            every = [name for names in keys.values() for name in names]
            fit = set(_of_one_modality(every, f"{where} ({field})", listing))
            kept = {key: [n for n in names if n in fit] for key, names in keys.items()}
            files_of[field] = {key: names for key, names in kept.items() if names}
        samples = complete(files_of, listing)
    else:
        samples = [(name,) for name in _of_one_modality(others, where, listing)]
    parts = {
        names[0]: tuple(Part(extension_of(plain_path(name)), seen[name]) for name in names)
        for names in samples
    }
    names = list(parts)
    labels = _labels(names, selection, {name: seen[name] for name in lists}, read, listing)
    listing.entries = [
        Entry(name, parts[name], label) for name, label in zip(names, labels, strict=True)
    ]
    return listing


def _usable(files: Iterable[File], listing: Listing) -> dict[str, Span]:
    seen: dict[str, Span] = {}
    for name, span in files:
        if reason := system_file(name):
            listing.ignored.append((printable(name), reason))
        elif ".." in plain_path(name).split("/"):
            listing.skipped.append((name, "has a name outside the source"))
        elif name in seen:
            listing.skipped.append((name, "is duplicate; the first was taken"))
        else:
            seen[name] = span
    return seen


def _of_one_modality(names: Sequence[str], where: str, listing: Listing) -> list[str]:
    """The files of the commonest modality, which is added to those of ``listing``."""
    components = {name: extension_of(plain_path(name)) for name in names}
    modality = _modality(components.values(), where, listing)
    found = []
    for name, component in components.items():
        if MODALITY.get(component) == modality:
            found.append(name)
        elif component in UNSUPPORTED_IMAGES:
            reason = unsupported_image(UNSUPPORTED_IMAGES[component])
            listing.skipped.append((name, reason))
        else:
            listing.skipped.append((name, f"is not {_A_MODALITY[modality]} (.{component})"))
    listing.modalities = [*listing.modalities, modality]
    return found


def _labels(
    names: list[str],
    selection: Selection,
    lists: Mapping[str, Span],
    read: Callable[[Span], bytes],
    listing: Listing,
) -> Sequence[Label]:
    """The label of each file; removes files that are skipped from ``names``."""
    if selection.labels == "none":
        return [None] * len(names)
    if selection.labels is not None and selection.labels != "folders":
        return _listed(names, _labels_file(selection.labels), selection.labels, listing)
    if lists and selection.labels is None:
        found = Labels()
        for name, span in lists.items():
            folder = name[: -len(STYLEGAN_LABELS)]
            text = read(span).decode("utf-8-sig", "replace")
            for row in json_rows(text, f"{listing.store.url}/{name}"):
                found.add(f"{folder}{row.get('file', '')}", row.get("label"))
        return _listed(names, found, STYLEGAN_LABELS, listing)
    requested = selection.labels == "folders"
    classes, strays = folder_classes([plain_path(name) for name in names], requested=requested)
    for i in sorted(strays, reverse=True):
        listing.skipped.append((names.pop(i), "is next to the class folders"))
        classes.pop(i)
    labels, listing.class_names = named(classes)
    return labels


def _modality(components: Iterable[str], where: str, listing: Listing) -> str:
    counts = Counter(components)
    found: Counter[str] = Counter()
    for component, count in counts.items():
        if component in MODALITY:
            found[MODALITY[component]] += count
    if not found:
        most = ", ".join(f"{n} × .{c}" for c, n in counts.most_common(3)) or "nothing"
        for name, reason in [*listing.skipped, *listing.ignored][:1]:
            most += f" ({printable(name)}: {reason})"
        rule = f"holds no files that can be packed, but {most}"
        raise DataError(where, rule, hint=_hint(counts))
    return max(_A_MODALITY, key=lambda modality: found[modality])


def _hint(counts: Mapping[str, int]) -> str:
    if {"tar", "zip", "gz", "tgz", "xz", "bz2", "7z", "rar"} & counts.keys():
        return "Unpack the archives inside it first"
    if UNSUPPORTED_IMAGES.keys() & counts.keys():
        return "Convert images to PNG or JPEG"
    return f"Supported are: {', '.join(MODALITY)}"


class Labels:
    """Labels of a list by the files' plain paths; ``conflicts`` are two different labels of one."""

    def __init__(self) -> None:
        self.files: dict[str, Label] = {}
        self.conflicts: dict[str, tuple[Label, Label]] = {}

    def add(self, file: object, label: Label) -> None:
        path = plain_path(str(file).strip())
        first = self.files.setdefault(path, label)
        if not same_label(first, label):
            self.conflicts.setdefault(path, (first, label))


def same_label(one: Label, other: Label) -> bool:
    """Return whether two labels mean the same class."""
    try:
        return normalized(one) == normalized(other)
    except CodecError:
        return bool(one == other)


def _labels_file(labels: str) -> Labels:
    if not is_list(labels):
        rule = f"must be none, folders, or a list that ends in .{', .'.join(EXTENSIONS)}"
        raise DataError("--labels", rule, value=labels)
    folder, _, name = labels.rpartition("/")
    return read_table(Store(folder or "."), name, lambda rows: _labels_of(rows, labels))


def _labels_of(rows: Iterator[Row], labels: str) -> Labels:
    first = next(rows, None)
    if first is None:
        raise DataError("--labels", "the file is empty", value=labels)
    columns = choose_columns([first], Selection(), labels)
    (content,) = columns.fields
    if content.is_text or columns.label is None:
        names = ", ".join(filter(None, first))
        rule = f"needs a column called file and one called label, and has {names}"
        raise DataError("--labels", rule, value=labels)
    found = Labels()
    for row in chain([first], rows):
        found.add(row.get(content.name), row.get(columns.label))
    return found


def _listed(names: list[str], found: Labels, where: str, listing: Listing) -> list[Label]:
    """The label of each file; removes files with two labels from ``names``."""
    if not found.files:
        return [None] * len(names)
    paths = {name: plain_path(name) for name in names}
    if not found.files.keys() & set(paths.values()):
        raise DataError(
            where,
            f"names none of the files: it has {next(iter(found.files))!r}, the source {names[0]!r}",
            hint="Name files by their path inside SOURCE",
        )
    if absent := found.files.keys() - set(paths.values()):
        listing.notes.append(
            f"{where} names {len(absent)} files that are not in the source, such as {min(absent)}"
        )
    for name in [name for name in names if paths[name] in found.conflicts]:
        one, other = found.conflicts[paths[name]]
        listing.skipped.append((name, f"is in {where} with two labels, {one!r} and {other!r}"))
        names.remove(name)
    return [found.files.get(paths[name]) for name in names]
