"""Files in folders, be they on storage or in an archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from gatdist.data.codecs import UNSUPPORTED_IMAGES, unsupported_image
from gatdist.data.packing.entries import MODALITY, Entry, Label, LeftOut, Listing, Span
from gatdist.data.packing.labels import folder_classes, named
from gatdist.data.packing.sources.asked import Asked
from gatdist.data.packing.sources.tables import (
    EXTENSIONS,
    choose_columns,
    extension_of,
    is_list,
    json_rows,
    read_rows,
)
from gatdist.errors import DataError
from gatdist.storage import Store

# The StyleGAN tools' list of labels, at the top of a folder or zip.
STYLEGAN_LABELS = "dataset.json"

_OF_THE_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}
_A_MODALITY = {"image": "picture", "audio": "sound", "text": "text", "array": "array"}


class File(NamedTuple):
    """A file of a tree: its path in it, and where its bytes are."""

    name: str
    span: Span


def list_tree(
    store: Store,
    files: Iterable[File],
    asked: Asked,
    read: Callable[[Span], bytes],
    left_out: Sequence[LeftOut] = (),
) -> Listing:
    """A sample for each file of the kind that most files are.

    Args:
        store: the folder that spans are relative to.
        files: all there are.
        asked: how labels are found.
        read: reads a file of the tree, for ``dataset.json``.
        left_out: what is known to be no sample already.

    Raises:
        DataError: no file is of a known kind, or the labels can't be read or fit no file.
    """
    seen: dict[str, Span] = {}
    listing = Listing(store, "", [], left_out=list(left_out))
    for name, span in files:
        if is_hidden(name):
            continue
        if name in seen:
            listing.left_out.append((name, "stands twice, and the first was taken"))
        else:
            seen[name] = span
    stylegan = seen.pop(STYLEGAN_LABELS, None)
    if asked.labels:  # the list of labels may lie among the files
        seen.pop(asked.labels.removeprefix(f"{store.url}/"), None)
    components = {name: extension_of(name) for name in seen}
    listing.modality = _modality(components.values(), store)
    names = []
    for name, component in components.items():
        if MODALITY.get(component) == listing.modality:
            names.append(name)
        elif component in UNSUPPORTED_IMAGES:
            reason = unsupported_image(UNSUPPORTED_IMAGES[component])
            listing.left_out.append((name, reason))
        else:
            what = _A_MODALITY[listing.modality]
            listing.left_out.append((name, f"is no {what} (.{component})"))
    labels: Sequence[Label]
    if asked.labels == "none":
        labels = [None] * len(names)
    elif asked.labels is not None and asked.labels != "folders":
        labels = _listed(names, _labels_file(asked.labels), asked.labels, listing)
    elif stylegan is not None and asked.labels is None:
        labels = _listed(names, _stylegan_labels(read(stylegan), store), STYLEGAN_LABELS, listing)
    else:
        labels, listing.class_names = named(folder_classes(names))
    listing.entries = [
        Entry(name, components[name], seen[name], label)
        for name, label in zip(names, labels, strict=True)
    ]
    return listing


def is_hidden(name: str) -> bool:
    """Whether a file is an operating system's own."""
    return any(part.startswith(".") or part.lower() in _OF_THE_SYSTEM for part in name.split("/"))


def _modality(components: Iterable[str], store: Store) -> str:
    counts = Counter(components)
    found: Counter[str] = Counter()
    for component, count in counts.items():
        if component in MODALITY:
            found[MODALITY[component]] += count
    if not found:
        most = ", ".join(f"{n} × .{c}" for c, n in counts.most_common(3)) or "nothing"
        mend = f"Give files of these kinds: {', '.join(MODALITY)}"
        if any(component in UNSUPPORTED_IMAGES for component in counts):
            mend = "Convert images to PNG or JPEG"
        raise DataError(store.url, f"holds no files that can be packed, but {most}", mend=mend)
    return max(_A_MODALITY, key=lambda modality: found[modality])


def _labels_file(labels: str) -> Mapping[str, Label]:
    """Label of each file, from a CSV or JSON list."""
    if not is_list(labels):
        rule = f"must be none, folders, or a list that ends in .{', .'.join(EXTENSIONS)}"
        raise DataError("--labels", rule, value=labels)
    folder, _, name = labels.rpartition("/")
    store = Store(folder or ".")
    rows = read_rows(store, name)
    first = next(rows, None)
    if first is None:
        raise DataError("--labels", "the file is empty", value=labels)
    columns = choose_columns(first, Asked(), labels)
    if columns.content is None or columns.label is None:
        rule = f"needs a column called file and one called label, and has {', '.join(first)}"
        raise DataError("--labels", rule, value=labels)
    file, label = columns.content, columns.label
    found = {str(first[file]).removeprefix("./"): first[label]}
    for row in rows:
        found.setdefault(str(row[file]).removeprefix("./"), row[label])
    return found


def _stylegan_labels(content: bytes, store: Store) -> Mapping[str, Label]:
    rows = json_rows(content.decode("utf-8", "replace"), f"{store.url}/{STYLEGAN_LABELS}")
    return {str(row["file"]): row["label"] for row in rows}


def _listed(
    names: Sequence[str], labels: Mapping[str, Label], where: str, listing: Listing
) -> list[Label]:
    if not labels:
        return [None] * len(names)
    if not labels.keys() & set(names):
        raise DataError(
            where,
            f"names none of the files: it has {next(iter(labels))!r}, the source {names[0]!r}",
            mend="Name files by their path inside SOURCE",
        )
    if absent := labels.keys() - set(names):
        listing.notes.append(
            f"{where} names {len(absent)} files that are not in the source, such as {min(absent)}"
        )
    return [labels.get(name) for name in names]
