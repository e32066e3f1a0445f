"""Find the files of each field of the samples, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gatdist.common.errors import ConfigError, DataError
from gatdist.data.format.manifest import TARGET
from gatdist.packing.entries import MODALITY, Listing, printable
from gatdist.packing.sources.files import plain_path

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ANY = ".*"


def read_fields(given: Mapping[str, str]) -> dict[str, str]:
    """Return where the files of each field are, by name; that of the generated field is the first.

    It is the field ``target``, or else the first one. Raises ConfigError.
    """
    for name, where in given.items():
        if not _NAME.fullmatch(name):
            rule = "must be a lower-case letter, then letters, digits and _"
            raise ConfigError("--field", rule, value=name, hint="Use NAME=WHERE")
        if not where:
            raise ConfigError("--field", "must say where its files are", value=f"{name}=")
    if len(given) == 1:
        hint = "For one field, choose its files with --column or --extension"
        raise ConfigError("--field", "is needed for two fields or more", value=name, hint=hint)
    return dict(sorted(given.items(), key=lambda field: field[0] != TARGET))


def belonging(where: str, components: Iterable[str]) -> list[str]:
    """Return which of these extensions of a key's files belong to a field.

    ``where`` is one extension, such as ``input.png``, or ``input.*`` for any known one.
    """
    if not where.endswith(_ANY):
        return [component for component in components if component == where.lower()]
    begin = where.removesuffix("*").lower()
    return [c for c in components if c.startswith(begin) and c.removeprefix(begin) in MODALITY]


class Pattern(NamedTuple):
    """Files whose path begins and ends so; what is between is the key of the sample."""

    prefix: str
    suffix: str

    @classmethod
    def of(cls, where: str) -> Pattern:
        """Read a folder, ``photos``, or a path in which ``*`` is the key, ``*_input.png``."""
        path = plain_path(where)
        if path.count("*") > 1:
            path = path.removesuffix(_ANY)
        if "*" not in path:
            path = f"{path}/*" if path else "*"
        prefix, _, suffix = path.partition("*")
        if "*" in suffix:
            hint = "Such as photos, or *_input.png"
            raise ConfigError("--field", "must contain one *", value=where, hint=hint)
        return cls(prefix, suffix)

    def key(self, name: str) -> str:
        """Return the key of a file; "" if it is another one. The extension need not be named."""
        path = plain_path(name)
        folder, slash, last = path.rpartition("/")
        stem = last.rpartition(".")[0] or last
        for found in (f"{folder}{slash}{stem}", path):
            end = len(found) - len(self.suffix)
            fits = found.startswith(self.prefix) and found.endswith(self.suffix)
            if fits and len(self.prefix) < end:
                return found[len(self.prefix) : end]
        return ""


def field_files(
    names: Iterable[str], fields: Mapping[str, str], listing: Listing
) -> dict[str, dict[str, list[str]]]:
    """Return the files of each field by key. A file belongs to the field that names most of it.

    Raises DataError if a field has no file, and if a file may belong to two fields.
    """
    patterns = {field: Pattern.of(where) for field, where in fields.items()}
    found: dict[str, dict[str, list[str]]] = {field: {} for field in fields}
    for name in names:
        keys = {field: key for field, each in patterns.items() if (key := each.key(name))}
        if not keys:
            listing.ignored.append((printable(name), "is in none of the fields"))
            continue
        length = {field: len(patterns[field].prefix + patterns[field].suffix) for field in keys}
        best = [field for field in keys if length[field] == max(length.values())]
        if len(best) > 1:
            rule = f"both match {printable(name)}"
            raise DataError("--field", rule, value=" and ".join(best), hint="Distinguish them")
        found[best[0]].setdefault(keys[best[0]], []).append(name)
    for field, keys_of in found.items():
        if not keys_of:
            hint = "Name a folder inside SOURCE, or a path with * for the key, such as *_input.png"
            value = f"{field}={fields[field]}"
            raise DataError("--field", "no file in SOURCE matches", value=value, hint=hint)
    return found


def complete(
    files: Mapping[str, Mapping[str, Sequence[str]]], listing: Listing
) -> list[tuple[str, ...]]:
    """Return the file of each field of the samples that have one of each; skip the others.

    Raises DataError if there is none.
    """
    keys = list(dict.fromkeys(key for keys_of in files.values() for key in keys_of))
    samples, lacking = [], []
    for key in keys:
        found = {field: keys_of.get(key, ()) for field, keys_of in files.items()}
        twice = [field for field, names in found.items() if len(names) > 1]
        missing = [field for field, names in found.items() if not names]
        if twice:
            names = " and ".join(map(printable, found[twice[0]]))
            listing.skipped.append((found[twice[0]][0], f"is not alone as {twice[0]}: {names}"))
        elif missing:
            name = next(names[0] for names in found.values() if names)
            lacking.append((name, f"has no file of the field {' and '.join(missing)}"))
        else:
            samples.append(tuple(names[0] for names in found.values()))
    listing.skipped += lacking
    if not samples:
        name, reason = listing.skipped[-1]
        rule = f"no sample has a file of each field; {printable(name)} {reason}"
        hint = "Files of a sample must be named alike"
        raise DataError("--field", rule, value=", ".join(files), hint=hint)
    return samples
