"""The index of a shard: where each of its files is."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.format.manifest import Shard
from gatdist.errors import DataError, StorageError
from gatdist.storage import Store

# Key and component (bytes), offset and size of the content in bytes, CRC-32.
Row = tuple[bytes, bytes, int, int, int]

_MAKE_AGAIN = "Pack or index the data again"


def read_index(store: Store, shard: Shard) -> NDArray[Any]:
    """The index of a shard: a structured array, one row a file in the order of the tar.

    Fields: ``key`` and ``component`` (bytes), ``offset`` and ``size`` of the content in bytes,
    ``crc32``.

    Raises:
        DataError: it is absent, or not the one that the manifest names.
    """
    subject = f"{store.url}/{shard.index}"
    try:
        content = store.read(shard.index)
    except StorageError as error:
        raise DataError(
            subject, f"the manifest names it, but it can't be read ({error})", mend=_MAKE_AGAIN
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        raise DataError(
            subject,
            f"has SHA-256 {found}, the manifest says {shard.index_sha256}",
            mend=_MAKE_AGAIN,
        )
    index: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return index


def encode_index(rows: Sequence[Row]) -> bytes:
    """An index as a file, ``.npy``. ``rows`` has at least one."""
    keys, components, *_ = zip(*rows, strict=True)
    dtype = [
        ("key", f"S{max(map(len, keys))}"),
        ("component", f"S{max(map(len, components))}"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("crc32", "<u4"),
    ]
    file = io.BytesIO()
    np.save(file, np.array(rows, dtype=dtype), allow_pickle=False)
    return file.getvalue()
