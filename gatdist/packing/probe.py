"""Find what the first samples of a source have in common, and estimate the sizes of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gatdist.common.errors import DataError
from gatdist.config import redact_url
from gatdist.data.codecs import CodecError
from gatdist.packing.entries import Entry
from gatdist.packing.fetch import Contents, Fetcher
from gatdist.packing.samples import Samples
from gatdist.packing.task import Request
from gatdist.storage import Store

# Samples that are read to find what all have in common, and converted to estimate their sizes.
_PROBED, _CONVERTED = 64, 8
_PROBED_BYTES = 2**28
# Overhead of a file in a tar: a header of 512 bytes, and padding to a multiple of 512.
_TAR_BYTES = 512 + 256


def probe(
    request: Request,
    modalities: Mapping[str, str],
    entries: Sequence[Entry],
    stores: Sequence[Store],
) -> tuple[Samples, list[float]]:
    """Return the converter for all samples, and the estimated bytes of each entry in a shard.

    Both depend on the first entries alone, in their order, so that a rerun finds the same.

    Args:
        request: Of the user.
        modalities: Of the fields, by name.
        entries: Of the source, in the order in which they are packed.
        stores: Folders that files may be in.

    Raises:
        DataError: None of the samples can be packed, or they have too little in common.
    """
    reason = ""
    with Fetcher(stores, request.allowed_origins) as fetcher:
        for first in range(0, len(entries), _PROBED):
            contents: list[Contents] = []
            num_bytes = 0
            for entry, files in fetcher.fetch(entries[first : first + _PROBED]):
                wrong = next((content for content in files if isinstance(content, str)), "")
                reason = reason or (f"{entry.name} {wrong}" if wrong else "")
                if wrong:
                    continue
                contents.append(files)
                num_bytes += sum(map(len, files))
                if num_bytes > _PROBED_BYTES:  # long recordings
                    break
            convert = Samples.like(request.recipe, modalities, contents)
            packed: list[_Packed] = []
            if convert is None:
                continue
            for files in contents:
                if len(packed) == _CONVERTED:
                    break
                try:
                    packed.append(_packed(convert, files))
                except CodecError as error:
                    reason = reason or f"one {error}"
            if packed:
                are_cut = request.recipe.clip_length is not None
                return convert, _sizes(entries, packed, are_cut=are_cut)
    rule = f"none of its {len(entries)} samples can be packed ({reason or 'they are unreadable'})"
    raise DataError(redact_url(request.source), rule, hint="Check the path and --kind")


class _Packed(NamedTuple):
    before: int  # bytes of the files
    after: int  # bytes of the samples that they become
    stays: bool  # whether these are the same


def _packed(convert: Samples, contents: Contents) -> _Packed:
    files = [content for content in contents[: len(convert.fields)] if isinstance(content, bytes)]
    count = convert.count(contents)
    components = next(convert(contents)).components.values()
    size = sum(map(len, components))
    if count > 1:
        size += len(components) * _TAR_BYTES
    return _Packed(sum(map(len, files)), count * size, stays=[*components] == files)


def _sizes(entries: Sequence[Entry], packed: Sequence[_Packed], *, are_cut: bool) -> list[float]:
    total = sum(each.after for each in packed)
    growth = total / max(1, sum(each.before for each in packed))
    is_proportional = are_cut or all(each.stays for each in packed)
    sizes = []
    for entry in entries:
        num_files = len(entry.files) + (entry.label is not None)
        size = total / len(packed)
        if is_proportional and entry.size is not None:
            size = entry.size * growth
        sizes.append(size + num_files * _TAR_BYTES)
    return sizes
