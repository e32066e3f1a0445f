"""Classes: where they come from, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from gatdist.data.packing.entries import Entry, LeftOut
from gatdist.errors import DataError

# Past this it is no class but an identity number, and a network could not embed it.
_MOST_CLASSES = 1_000_000
_OTHER = "Name another column with --labels, or leave labels out with --labels none"


def folder_classes(names: Sequence[str]) -> list[str | None]:
    """The class of each file: the first folder of its path in which the files differ.

    None for all of them where a file lies beside the folders, or all lie in one.
    """
    parts = [name.split("/") for name in names]
    depth = 0
    while parts and all(len(path) > depth + 1 for path in parts):
        if any(path[depth] != parts[0][depth] for path in parts):
            return [path[depth] for path in parts]
        depth += 1
    return [None] * len(names)


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
    return [None if name is None else numbers[name] for name in classes], order


def numbered(
    entries: Sequence[Entry], given: Sequence[str] | None, left_out: list[LeftOut]
) -> tuple[list[Entry], list[str] | None, int]:
    """Give each entry the number of its class.

    Where all labels are whole numbers, these are the classes. Else they are names, which are sorted
    and numbered in that order.

    Args:
        entries: with labels as the source has them, all None where it has none.
        given: names of the classes, where the source has them apart.
        left_out: gets the entries without a label, where others have one.

    Returns:
        The entries that have a class, the classes' names (None where they have none), and how many
        classes there are (0 where there are no labels).

    Raises:
        DataError: a label is neither a whole number nor a name, or out of range.
    """
    labels = [_plain(entry.label) for entry in entries]
    found = {label for label in labels if label is not None}
    if not found:
        return [entry._replace(label=None) for entry in entries], None, 0
    kept = []
    if all(isinstance(label, int) or _is_number(label) for label in found):
        numbers = {label: _in_range(int(label), given) for label in found}
        names, count = list(given) if given else None, len(given or ()) or max(numbers.values()) + 1
    else:
        order = sorted(map(str, found))
        places = {name: place for place, name in enumerate(order)}
        numbers = {label: places[str(label)] for label in found}
        names, count = order, len(order)
    for entry, label in zip(entries, labels, strict=True):
        if label is None:
            left_out.append((entry.name, "has no label, as others have"))
        else:
            kept.append(entry._replace(label=numbers[label]))
    return kept, names, count


def _plain(label: object) -> int | str | None:
    """A label without the varieties of notation: 3.0 as 3, an empty one as none."""
    if label is None or label == "":
        return None
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, int | str) and not isinstance(label, bool):
        return label
    raise DataError("label", "a class must be a whole number or a name", value=label, mend=_OTHER)


def _in_range(number: int, names: Sequence[str] | None) -> int:
    most = len(names) if names else _MOST_CLASSES
    if not 0 <= number < most:
        rule = f"the number of a class must be 0 to {most - 1}"
        raise DataError("label", rule, value=number, mend=_OTHER)
    return number


def _is_number(label: object) -> bool:
    return isinstance(label, str) and label.isascii() and label.removeprefix("-").isdecimal()
