"""Shards on storage: plain WebDataset tars, an index beside each, and the manifest, written last.

::

    shard-000000.tar          USTAR, mtime 0; the files of a sample share their key: 000042.png,
    000042.cls shard-000000.index.npy    one row a file: key, component, offset, size, crc32
    manifest.json             what the data set is, and each shard's size, count and SHA-256

A folder without a manifest is no data set, so that one half written is never taken for whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gatdist.data.order import ORDER_VERSION
from gatdist.errors import DataError, StorageError
from gatdist.storage import Store

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_TAR_BLOCK = 512
_PACK_AGAIN = "Pack the data again"

# A shard's name comes from a file that others may have written: it must not lead out of the folder.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[int, Field(gt=0)]

# The files of one sample by component, which follows the first dot: {"png": b"…", "cls": b"7"}.
Components = Mapping[str, bytes]


class Shard(BaseModel):
    """One tar and its index, as the manifest tells them. Sizes in bytes."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: _FileName
    num_samples: _Positive
    size: _Positive
    sha256: _Digest
    index: _FileName
    index_sha256: _Digest


class Manifest(BaseModel):
    """What a data set is.

    Attributes:
        sample_shape: (C, H, W) of images, (n,) of points.
        num_classes: 0 where there are no labels.
        fingerprint: SHA-256 (hex) over all content, in its order.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    version: int = FORMAT_VERSION
    order_version: int = ORDER_VERSION
    modality: Literal["image", "points"]
    sample_shape: list[_Positive]
    num_classes: Annotated[int, Field(ge=0)]
    num_samples: int
    fingerprint: _Digest
    shards: list[Shard]

    @model_validator(mode="after")
    def _fitting_shape(self) -> Self:
        if self.modality == "image" and (
            len(self.sample_shape) != 3 or self.sample_shape[0] not in (1, 3)
        ):
            raise ValueError("the sample_shape of images must be [1 or 3, height, width]")
        return self


def write_dataset(
    store: Store,
    shards: Iterable[Iterable[tuple[str, Components]]],
    *,
    modality: Literal["image", "points"],
    sample_shape: Sequence[int],
    num_classes: int = 0,
) -> Manifest:
    """Write a data set: shards, their indexes, and at last the manifest.

    Args:
        store: the folder.
        shards: for each shard its samples, as for :func:`write_shard`.
        modality: of the samples.
        sample_shape: see :class:`Manifest`.
        num_classes: with classes, every sample needs the component ``cls``.
    """
    written = [write_shard(store, f"shard-{i:06d}", samples) for i, samples in enumerate(shards)]
    return write_manifest(
        store, written, modality=modality, sample_shape=sample_shape, num_classes=num_classes
    )


def write_shard(store: Store, name: str, samples: Iterable[tuple[str, Components]]) -> Shard:
    """Write one tar and its index.

    Args:
        store: the folder.
        name: of the shard, without extension.
        samples: (key, components) of each, at least one. Keys are unique and without a dot in their
            last part; components are lower case, as WebDataset has them.

    Raises:
        DataError: a key or component breaks these rules, or there is no sample.
    """
    rows: list[tuple[bytes, bytes, int, int, int]] = []
    digest = hashlib.sha256()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="gatdist-shard-") as folder:
        path = Path(folder, name)
        with path.open("wb") as tar:

            def put(data: bytes) -> None:
                tar.write(data)
                digest.update(data)

            for key, components in samples:
                _require_names(name, key, components, seen)
                for component, content in components.items():
                    put(_tar_header(name, f"{key}.{component}", len(content)))
                    rows.append(
                        (
                            key.encode(),
                            component.encode(),
                            tar.tell(),
                            len(content),
                            zlib.crc32(content),
                        )
                    )
                    put(content + bytes(-len(content) % _TAR_BLOCK))
            put(bytes(2 * _TAR_BLOCK))  # the end of a tar
            size = tar.tell()
        if not rows:
            raise DataError(f"{store.url}/{name}", "a shard needs at least one sample")
        store.publish_file(f"{name}.tar", path)
    index = _encode_index(rows)
    store.publish(f"{name}.index.npy", index)
    return Shard(
        name=f"{name}.tar",
        num_samples=len(seen),
        size=size,
        sha256=digest.hexdigest(),
        index=f"{name}.index.npy",
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def write_manifest(
    store: Store,
    shards: Sequence[Shard],
    *,
    modality: Literal["image", "points"],
    sample_shape: Sequence[int],
    num_classes: int = 0,
) -> Manifest:
    """Turn a folder of finished shards into a data set. See :func:`write_dataset`."""
    manifest = Manifest(
        modality=modality,
        sample_shape=list(sample_shape),
        num_classes=num_classes,
        num_samples=sum(shard.num_samples for shard in shards),
        fingerprint=_fingerprint(modality, sample_shape, num_classes, shards),
        shards=list(shards),
    )
    store.publish(MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())
    return manifest


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest of the data set in ``store``.

    Raises:
        DataError: there is none, or it is damaged, of an unknown version, or of no samples.
        StorageError: the folder may not be read.
    """
    subject = f"{store.url}/{MANIFEST}"
    if not store.exists(MANIFEST):
        _raise_no_manifest(store)
    try:
        values = json.loads(store.read(MANIFEST))
        version = values["version"]
        order_version = values["order_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(subject, f"is no manifest ({error!r})", mend=_PACK_AGAIN) from None
    if (version, order_version) != (FORMAT_VERSION, ORDER_VERSION):
        raise DataError(
            subject,
            f"this gatdist reads version {FORMAT_VERSION} with order version {ORDER_VERSION}",
            value=(version, order_version),
            mend="Use the gatdist that wrote it, or pack the data again",
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(subject, f"{where}: {problem['msg']}", mend=_PACK_AGAIN) from None
    if not manifest.shards:
        raise DataError(store.url, "the data set is empty", mend="Pack at least one sample")
    found = _fingerprint(
        manifest.modality, manifest.sample_shape, manifest.num_classes, manifest.shards
    )
    if found != manifest.fingerprint or manifest.num_samples != sum(
        s.num_samples for s in manifest.shards
    ):
        rule = f"was changed after it was written; what it lists has the fingerprint {found}"
        raise DataError(
            f"{subject}: fingerprint", rule, value=manifest.fingerprint, mend=_PACK_AGAIN
        )
    return manifest


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
            subject, f"the manifest names it, but it can't be read ({error})", mend=_PACK_AGAIN
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        raise DataError(
            subject,
            f"has SHA-256 {found}, the manifest says {shard.index_sha256}",
            mend=_PACK_AGAIN,
        )
    index: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return index


def _encode_index(rows: Sequence[tuple[bytes, bytes, int, int, int]]) -> bytes:
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


def _require_names(shard: str, key: str, components: Components, seen: set[str]) -> None:
    """WebDataset's rules: an extension begins at the first dot, in lower case; no file is twice."""
    if not key or "." in key.rsplit("/", 1)[-1]:
        raise DataError(
            f"{shard}: key",
            "must not be empty or hold a dot, which begins the extension",
            value=key,
        )
    if key in seen:
        raise DataError(f"{shard}: key", "stands twice in the shard", value=key)
    seen.add(key)
    for component in components:
        if not component or component != component.lower() or "/" in component:
            raise DataError(
                f"{shard}: {key}", "an extension must be lower case letters", value=component
            )


def _tar_header(shard: str, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(
        name
    )  # its mtime is 0, an integer: a float would add a header of 1,024 bytes
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")
    except ValueError as error:
        raise DataError(
            f"{shard}: {name}", f"can't stand in a USTAR tar ({error})", mend="Shorten the key"
        ) from None


def _fingerprint(
    modality: str, sample_shape: Sequence[int], num_classes: int, shards: Sequence[Shard]
) -> str:
    content = [
        modality,
        list(sample_shape),
        num_classes,
        [[s.num_samples, s.sha256] for s in shards],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _raise_no_manifest(store: Store) -> None:
    names = store.list()
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if tars:
        raise DataError(
            store.url,
            f"holds {len(tars)} tars such as {tars[0]} but no {MANIFEST}",
            mend="Pack them with gatdist pack",
        )
    if names:
        raise DataError(
            store.url,
            f"holds no shards and no {MANIFEST}",
            mend="Check data.url, or pack the data there",
        )
    raise DataError(store.url, "does not exist or is empty", mend="Check data.url")
