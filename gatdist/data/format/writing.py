"""Writing shards."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from gatdist.common.errors import DataError
from gatdist.data.format.index import Row, encode_index
from gatdist.data.format.manifest import Manifest, Modality, SampleSpec, Shard, write_manifest
from gatdist.data.format.tars import TAR_BLOCK
from gatdist.storage import Store

# Files of one sample by component, the part after the first dot: {"png": b"…", "cls": b"7"}.
Components = Mapping[str, bytes]


def write_dataset(
    store: Store,
    shards: Iterable[Iterable[tuple[str, Components]]],
    *,
    modality: Modality,
    sample_shape: Sequence[int | None],
    **spec: Any,
) -> Manifest:
    """Write a data set: shards, their indexes, and last the manifest.

    ``shards`` holds the samples of each, as for :func:`write_shard`; the other arguments are fields
    of :class:`SampleSpec`.
    """
    sample_spec = SampleSpec(modality=modality, sample_shape=list(sample_shape), **spec)
    written = [write_shard(store, f"shard-{i:06d}", samples) for i, samples in enumerate(shards)]
    return write_manifest(store, written, sample_spec)


def write_shard(store: Store, name: str, samples: Iterable[tuple[str, Components]]) -> Shard:
    """Write one tar and its index.

    Args:
        store: the folder.
        name: of the shard, without extension.
        samples: (key, components) of one or more. Keys are unique, with no dot in their last part;
            components are lower case, as in WebDataset.

    Raises:
        DataError: an invalid key or component, or no sample.
    """
    rows: list[Row] = []
    digest = hashlib.sha256()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="gatdist-shard-") as folder:
        path = Path(folder, name)
        with path.open("wb") as tar:

            def put(data: bytes) -> None:
                tar.write(data)
                digest.update(data)

            for key, components in samples:
                _check_names(name, key, components, seen)
                for component, content in components.items():
                    put(_tar_header(name, f"{key}.{component}", len(content)))
                    names = key.encode(), component.encode()
                    rows.append((*names, tar.tell(), len(content), crc32(content)))
                    put(content + bytes(-len(content) % TAR_BLOCK))
            put(bytes(2 * TAR_BLOCK))  # end of archive
            size = tar.tell()
        if not rows:
            raise DataError(f"{store.url}/{name}", "a shard must have at least one sample")
        store.publish_file(f"{name}.tar", path)
    index = encode_index(rows)
    store.publish(f"{name}.index.npy", index)
    return Shard(
        name=f"{name}.tar",
        num_samples=len(seen),
        size=size,
        sha256=digest.hexdigest(),
        index=f"{name}.index.npy",
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _check_names(shard: str, key: str, components: Components, seen: set[str]) -> None:
    """Check WebDataset's rules: lower-case extensions after the first dot, unique names."""
    if not key or "." in key.rsplit("/", 1)[-1]:
        rule = "must not be empty or contain a dot, which begins the extension"
        raise DataError(f"{shard}: key", rule, value=key)
    if key in seen:
        raise DataError(f"{shard}: key", "must be unique in the shard", value=key)
    seen.add(key)
    for component in components:
        if not component or component != component.lower() or "/" in component:
            raise DataError(f"{shard}: {key}", "an extension must be lower case", value=component)


def _tar_header(shard: str, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime 0 is an integer: a float would add 1,024 bytes
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")
    except ValueError as error:
        rule = f"does not fit a USTAR header ({error})"
        raise DataError(f"{shard}: {name}", rule, hint="Shorten the key") from None
