"""WebDataset shards: tars in which the files of a sample share their key and stand together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from gatdist.data.packing.entries import MODALITY, Entry, Label, Listing, Span
from gatdist.data.packing.fetch import Fetcher
from gatdist.data.packing.sources.asked import Asked
from gatdist.data.packing.sources.tables import majority
from gatdist.data.packing.sources.tree import File, is_hidden
from gatdist.storage import Store

LABEL = "cls"


class _Sample(NamedTuple):
    name: str
    files: Mapping[str, Span]  # by extension


def list_shards(
    store: Store, shards: Mapping[str, Iterable[File]], asked: Asked, listing: Listing
) -> Listing:
    """A sample for each key of each shard; what else a sample has is kept beside it.

    Args:
        store: the folder that spans are relative to.
        shards: the files of each tar, in its order, by the tar's name.
        asked: ``labels`` is a field of ``.json``; by default, labels are read from ``.cls``.
        listing: gets the samples.
    """
    samples = [
        sample for shard, files in shards.items() for sample in _samples(shard, files, listing)
    ]
    listing.modality = majority(component for sample in samples for component in sample.files)
    with Fetcher([store]) as fetcher:
        labels = _labels(samples, asked, fetcher)
    entries = []
    for sample, label in zip(samples, labels, strict=True):
        chosen = [c for c in sample.files if MODALITY.get(c) == listing.modality]
        if len(chosen) != 1:
            found = ", ".join(f".{component}" for component in sample.files)
            listing.left_out.append((sample.name, f"needs one {listing.modality}, has {found}"))
            continue
        others = tuple(
            (component, span)
            for component, span in sorted(sample.files.items())
            if component not in (chosen[0], LABEL)
        )
        entries.append(Entry(sample.name, chosen[0], sample.files[chosen[0]], label, others))
    listing.entries = entries
    return listing


def _samples(shard: str, files: Iterable[File], listing: Listing) -> Iterator[_Sample]:
    seen = set()
    visible = (file for file in files if not is_hidden(file.name))
    for key, members in groupby(visible, key=lambda file: split(file.name)[0]):
        found: dict[str, Span] = {}
        for name, span in members:
            component = split(name)[1]
            if component in found:
                listing.left_out.append(
                    (f"{shard}/{name}", "stands twice, and the first was taken")
                )
            else:
                found[component] = span
        if key in seen:
            listing.left_out.append((f"{shard}/{key}", "its key stands in two places of the shard"))
        else:
            seen.add(key)
            yield _Sample(f"{shard}/{key}", found)


def split(name: str) -> tuple[str, str]:
    """Key and extension, in lower case: the extension begins at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _labels(samples: Sequence[_Sample], asked: Asked, fetcher: Fetcher) -> list[Label]:
    if asked.labels == "none":
        return [None] * len(samples)
    component = "json" if asked.labels else LABEL
    spans = [sample.files[component] for sample in samples if component in sample.files]
    contents = dict(zip(spans, fetcher.read(spans), strict=True))
    labels: list[Label] = []
    for sample in samples:
        content = contents.get(sample.files.get(component, Span("")), "")
        labels.append(_label(content, asked.labels) if isinstance(content, bytes) else None)
    return labels


def _label(content: bytes, field: str | None) -> Label:
    """A class out of ``.cls``, or out of a field of ``.json``; None where there is none."""
    try:
        text = content.decode()
        return json.loads(text).get(field) if field else text.strip() or None
    except (ValueError, AttributeError):
        return None
