"""The index of a shard: position of each file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs import encode_array, read_npy
from gatdist.data.format.manifest import Shard
from gatdist.storage import Store

# Key and component (bytes), offset and size of the content in bytes, CRC-32.
Row = tuple[bytes, bytes, int, int, int]

_KINDS = {"key": "|S", "component": "|S", "offset": "<i", "size": "<i", "crc32": "<u"}
_MAKE_AGAIN = "Pack or index the data again"


def read_index(store: Store, shard: Shard) -> NDArray[Any]:
    """Read the index of a shard: a structured array, one row per file in tar order.

    Fields: ``key`` and ``component`` (bytes), ``offset`` and ``size`` of the content in bytes,
    ``crc32``. Raises DataError if missing, or not the index in the manifest.
    """
    subject = f"{store.url}/{shard.index}"
    try:
        content = store.read(shard.index)
    except StorageError as error:
        rule = f"is in the manifest, but can't be read ({error})"
        raise DataError(subject, rule, hint=_MAKE_AGAIN) from error
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        rule = f"has SHA-256 {found}, the manifest says {shard.index_sha256}"
        raise DataError(subject, rule, hint=_MAKE_AGAIN)
    try:
        index = read_npy(content)
        _check(index, shard)
    except Exception as error:  # NumPy raises nearly anything for a damaged header
        problem = " ".join(str(error).split())
        rule = f"is not an index of {shard.name} ({problem})"
        raise DataError(subject, rule, hint=_MAKE_AGAIN) from None
    return index


def encode_index(rows: Sequence[Row]) -> bytes:
    """Return an index file (``.npy``) of one or more rows."""
    keys, components, *_ = zip(*rows, strict=True)
    dtype = [
        ("key", f"S{max(map(len, keys))}"),
        ("component", f"S{max(map(len, components))}"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("crc32", "<u4"),
    ]
    return encode_array(np.array(rows, dtype=dtype))


def _check(index: NDArray[Any], shard: Shard) -> None:
    """Raise ValueError unless files lie within the tar and samples are as many as listed."""
    dtype = index.dtype
    if dtype.names != tuple(_KINDS) or any(dtype[k].str[:2] != v for k, v in _KINDS.items()):
        raise ValueError(f"rows of {dtype}")
    if index.ndim != 1:
        raise ValueError(f"shape {index.shape}")
    offsets, sizes = index["offset"], index["size"]
    if offsets.min() < 0 or sizes.min() < 0 or (offsets > shard.size - sizes).any():
        raise ValueError("files outside the tar")
    keys = index["key"]
    found = 1 + np.count_nonzero(keys[1:] != keys[:-1])
    if found != shard.num_samples:
        raise ValueError(f"{found} samples instead of {shard.num_samples}")
    for names in (np.unique(index["component"]), keys):
        b"\n".join(names).decode()  # raises ValueError unless UTF-8
