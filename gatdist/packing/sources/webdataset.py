"""WebDataset shards: tars in which the files of a sample share a key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.labels import LABEL_COMPONENT, Label, read_label
from gatdist.packing.entries import MODALITY, Entry, Listing, Part, Selection, Span, printable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.sources.fields import belonging
from gatdist.packing.sources.files import File, split, system_file
from gatdist.packing.sources.tables import majority
from gatdist.storage import Store


class _Sample(NamedTuple):
    name: str
    files: Mapping[str, Span]  # by extension


def list_shards(
    stores: Sequence[Store],
    shards: Mapping[str, Iterable[File]],
    selection: Selection,
    listing: Listing,
) -> Listing:
    """Add a sample to ``listing`` for each key of each shard, with all its files.

    Labels are read from a field of ``.json`` if ``selection`` names one, else from ``.cls``.
    """
    samples = [
        sample for shard, files in shards.items() for sample in _samples(shard, files, listing)
    ]
    found = [component for sample in samples for component in sample.files]
    fields = selection.fields or {"": ""}
    listing.modalities = [
        majority(c.rpartition(".")[2] for c in belonging(where, found))
        if where
        else majority(found)
        for where in fields.values()
    ]
    with Fetcher(stores) as fetcher:
        labels = _labels(samples, selection, fetcher)
    entries = []
    for sample, label in zip(samples, labels, strict=True):
        if isinstance(label, CodecError):
            listing.skipped.append((sample.name, f"{label}"))
            continue
        chosen = []
        for (name, where), modality in zip(fields.items(), listing.modalities, strict=True):
            fitting = (
                belonging(where, sample.files)
                if where
                else [c for c in sample.files if MODALITY.get(c) == modality]
            )
            if len(fitting) != 1:
                has = ", ".join(f".{component}" for component in sample.files)
                what = f"file .{where} of the field {name}" if where else modality
                listing.skipped.append((sample.name, f"needs one {what}, has {has}"))
                break
            chosen += fitting
        else:
            others = sorted(sample.files.keys() - {*chosen, LABEL_COMPONENT})
            parts = tuple(Part(c.rpartition(".")[2], sample.files[c]) for c in chosen)
            more = tuple(Part(component, sample.files[component]) for component in others)
            entries.append(Entry(sample.name, parts, label, more))
    listing.entries = entries
    return listing


def _samples(shard: str, files: Iterable[File], listing: Listing) -> Iterator[_Sample]:
    """The samples of a shard; the files of a key need not be adjacent.

    A key with files of one kind in two places is two samples: the first one is taken.
    """
    samples: dict[str, dict[str, Span]] = {}
    visible = []
    for file in files:
        if reason := system_file(file.name):
            listing.ignored.append((f"{shard}/{printable(file.name)}", reason))
        else:
            visible.append(file)
    for key, members in groupby(visible, key=lambda file: split(file.name)[0]):
        found: dict[str, Span] = {}
        for name, span in members:
            component = split(name)[1]
            if component in found:
                listing.skipped.append((f"{shard}/{name}", "is duplicate; the first was taken"))
            else:
                found[component] = span
        former = samples.setdefault(key, {})
        if former.keys().isdisjoint(found):
            former.update(found)
        else:
            listing.skipped.append((f"{shard}/{key}", "its key is in two places of the shard"))
    for key, found in samples.items():
        yield _Sample(f"{shard}/{key}", found)


def _labels(
    samples: Sequence[_Sample], selection: Selection, fetcher: Fetcher
) -> list[Label | CodecError]:
    if selection.labels == "none":
        return [None] * len(samples)
    component = "json" if selection.labels else LABEL_COMPONENT
    spans = [sample.files[component] for sample in samples if component in sample.files]
    contents = dict(zip(spans, fetcher.read(spans), strict=True))
    labels: list[Label | CodecError] = []
    for sample in samples:
        content = contents[sample.files[component]] if component in sample.files else b""
        labels.append(_label(content, selection.labels if content else None))
    if selection.labels and not any(label is not None for label in labels):
        rule = "no sample has a .json with such a field"
        raise DataError("--labels", rule, value=selection.labels, hint="Name another, or none")
    return labels


def _label(content: bytes | str, field: str | None) -> Label | CodecError:
    if isinstance(content, str):
        return CodecError(f"its label {content}")
    try:
        return read_label(content, field or "")
    except CodecError as error:
        return error
