"""Classes: their sources and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.labels import MAX_CLASSES, Label, normalized
from gatdist.packing.entries import Entry, Skipped, printable

_OTHER = "Name another column with --labels, or use --labels none"
# Files next to the class folders are strays if they are at most one in this many.
_STRAYS = 10


def folder_classes(
    names: Sequence[str], *, requested: bool = False
) -> tuple[list[str | None], list[int]]:
    """Return the class of each file, None without one, and the indices of strays.

    A class is the first folder of the path in which the files differ. A few files next to the
    folders are strays. Without folders that differ, there are no classes. If ``requested``, even a
    single folder is a class, with any number of strays.

    Raises:
        DataError: too many files next to the folders to be strays; or folders are requested, and
            there are none.
    """
    parts = [name.split("/") for name in names]
    inside, strays, depth = list(range(len(parts))), list[int](), 0
    while inside:
        next_to = [i for i in inside if len(parts[i]) == depth + 1]
        inside = [i for i in inside if len(parts[i]) > depth + 1]
        strays += next_to
        folders = {parts[i][depth] for i in inside}
        if len(folders) > 1 or (requested and folders and next_to):
            if not requested and len(strays) > max(len(folders), len(inside) // _STRAYS):
                raise DataError(
                    "--labels",
                    f"{len(inside)} files are in {len(folders)} folders, such as {min(folders)}, "
                    f"and {len(strays)} next to them, such as {min(names[i] for i in strays)}",
                    hint="Use --labels folders to skip these, or --labels none to pack all",
                )
            chosen = {i: parts[i][depth] for i in inside}
            return [chosen.get(i) for i in range(len(names))], strays
        depth += 1
    if requested:
        rule = "all files are in one folder"
        raise DataError("--labels", rule, value="folders", hint="Use --labels none")
    return [None] * len(names), []


def named(classes: Sequence[str | None]) -> tuple[list[int | None], list[str] | None]:
    """Return the number of each class, and the names in that order (numeric if all are numbers).

    Unlike labels in a list, folders called 00000 and 01000 are two classes, not a thousand.
    """
    names = {name for name in classes if name is not None}
    if not names:
        return [None] * len(classes), None
    by_value = all(_is_number(name) for name in names)
    order = sorted(names, key=lambda name: (int(name), name) if by_value else (0, name))
    numbers = {name: number for number, name in enumerate(order)}
    numbers_of = [None if name is None else numbers[name] for name in classes]
    return numbers_of, [printable(name) for name in order]


def numbered(
    entries: Sequence[Entry], given: Sequence[str] | None, skipped: list[Skipped]
) -> tuple[list[Entry], list[str] | None, int]:
    """Replace each entry's label by the number of its class.

    See :func:`~gatdist.data.codecs.labels.normalized` for what a label means. If all are numbers,
    they are the classes. Otherwise all are names, numbered in sorted order. If some samples have a
    label, those without are skipped. ``given`` are names that the source has separately.

    Returns:
        The entries, the classes' names (None without names), and the number of classes (0 without
        labels).

    Raises:
        DataError: no label is a class, or there are more than 1,000,000.
    """
    labels: list[Label] = []
    usable = []
    refused: CodecError | None = None
    for entry in entries:
        try:
            label = normalized(entry.label)
            if isinstance(label, int) and given and label >= len(given):
                raise CodecError(f"has the label {label}, and there are {len(given)} classes")
        except CodecError as error:
            refused = refused or error
            skipped.append((entry.name, str(error)))
        else:
            usable.append(entry)
            labels.append(label)
    if refused and not any(label is not None for label in labels):
        raise DataError("label", f"{skipped[-1][0]} {refused}", hint=_OTHER)
    names, numbers, count = numbering({label for label in labels if label is not None})
    if not count:
        return [entry._replace(label=None) for entry in usable], None, 0
    if given and not names:
        names, count = list(given), len(given)
    kept = []
    for entry, label in zip(usable, labels, strict=True):
        if label is None:
            skipped.append((entry.name, UNLABELLED))
        else:
            kept.append(entry._replace(label=numbers[label]))
    return kept, names, count


UNLABELLED = "has no label, unlike others"


def numbering(labels: set[int | str]) -> tuple[list[str] | None, Mapping[int | str, int], int]:
    """Return the classes' names (None if labels are numbers), each one's number, and the count."""
    if all(isinstance(label, int) for label in labels):
        return None, {label: int(label) for label in labels}, max(map(int, labels), default=-1) + 1
    names = sorted({str(label) for label in labels})
    if len(names) > MAX_CLASSES:
        rule = f"there are {len(names):,} different labels, the most is {MAX_CLASSES:,}"
        raise DataError("label", rule, hint=_OTHER)
    places = {name: place for place, name in enumerate(names)}
    return names, {label: places[str(label)] for label in labels}, len(names)


def same_but_for_case(names: Sequence[str] | None) -> list[str]:
    """Return two names that differ in upper and lower case only; [] without."""
    seen: dict[str, str] = {}
    for name in names or ():
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return [other, name]
    return []


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdecimal()
