"""Classes: where they come from, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gatdist.common.errors import DataError
from gatdist.data.codecs import MAX_CLASSES, CodecError, Label, normalized
from gatdist.packing.entries import Entry, Skipped, printable

_OTHER = "Name another column with --labels, or leave labels out with --labels none"
# Files beside the folders of classes are strays up to one in so many.
_STRAYS = 10


class FolderClasses(NamedTuple):
    """Classes by folders.

    Attributes:
        classes: the class of each file; None for strays, and for all where folders are no classes.
        strays: numbers of the files that lie beside the folders.
    """

    classes: list[str | None]
    strays: list[int]


def folder_classes(names: Sequence[str], *, requested: bool = False) -> FolderClasses:
    """The class of each file: the first folder of its path in which the files differ.

    A few files that lie beside the folders are strays. Without folders that differ, there are no
    classes.

    Args:
        names: paths of the files, with ``/``.
        requested: folders are classes, however many files lie beside them, and be it one folder.

    Raises:
        DataError: as many files lie beside the folders as may be meant to be there; or folders are
            wanted, and there are none.
    """
    parts = [name.split("/") for name in names]
    inside, strays, depth = list(range(len(parts))), list[int](), 0
    while inside:
        beside = [i for i in inside if len(parts[i]) == depth + 1]
        inside = [i for i in inside if len(parts[i]) > depth + 1]
        strays += beside
        folders = {parts[i][depth] for i in inside}
        if len(folders) > 1 or (requested and folders and beside):
            if not requested and len(strays) > max(len(folders), len(inside) // _STRAYS):
                raise _ambiguous([names[i] for i in strays], folders, len(inside))
            chosen = {i: parts[i][depth] for i in inside}
            return FolderClasses([chosen.get(i) for i in range(len(names))], strays)
        depth += 1
    if requested:
        rule = "all files lie in one folder, so that folders are no classes"
        raise DataError("--labels", rule, value="folders", hint="Use --labels none")
    return FolderClasses([None] * len(names), [])


def _ambiguous(strays: Sequence[str], folders: set[str], inside: int) -> DataError:
    return DataError(
        "--labels",
        f"{inside} files lie in {len(folders)} folders, such as {min(folders)}, and {len(strays)} "
        f"beside them, such as {min(strays)}",
        hint="Say --labels folders to leave out those beside, or --labels none to pack all",
    )


def named(classes: Sequence[str | None]) -> tuple[list[int | None], list[str] | None]:
    """Numbers for names of classes, by their order (that of numbers where all are), and the names.

    Unlike numbers in a list, folders called 00000 and 01000 are two classes, not a thousand.
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
    """Give each entry the number of its class.

    See :func:`~gatdist.data.codecs.labels.normalized` for what a label means. Where all are
    numbers, these are the classes. Else all are names, which are sorted and numbered in that order.
    Where some samples have a label, those without are left out; where none has, all are kept.

    Args:
        entries: with labels as the source has them, all None where it has none.
        given: names of the classes, where the source has them apart.
        skipped: gets the entries without a label, where others have one.

    Returns:
        The entries that have a class, the classes' names (None where they have none), and how many
        classes there are (0 where there are no labels).

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


UNLABELLED = "has no label, as others have"


def numbering(
    labels: set[int | str],
) -> tuple[list[str] | None, Mapping[int | str, int], int]:
    """Names of the classes (None where labels are numbers), each label's number, and how many.

    Raises:
        DataError: there are too many.
    """
    if all(isinstance(label, int) for label in labels):
        return None, {label: int(label) for label in labels}, max(map(int, labels), default=-1) + 1
    names = sorted({str(label) for label in labels})
    if len(names) > MAX_CLASSES:
        rule = f"there are {len(names):,} different labels, the most is {MAX_CLASSES:,}"
        raise DataError("label", rule, hint=_OTHER)
    places = {name: place for place, name in enumerate(names)}
    return names, {label: places[str(label)] for label in labels}, len(names)


def same_but_for_case(names: Sequence[str] | None) -> list[str]:
    """Two of the names that differ in upper and lower case only; [] without."""
    seen: dict[str, str] = {}
    for name in names or ():
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return [other, name]
    return []


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdecimal()
