"""Shard files: reading and writing tars and their indexes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs.arrays import encode_array, read_npy
from gatdist.data.format.manifest import Manifest, Modality, SampleSpec, Shard, write_manifest
from gatdist.storage import Store

# Files of one sample by component, the part after the first dot: {"png": b"…", "cls": b"7"}.
Components = Mapping[str, bytes]
# Key and component (bytes), offset and size of the content in bytes, CRC-32.
Row = tuple[bytes, bytes, int, int, int]

_KINDS = {"key": "|S", "component": "|S", "offset": "<i", "size": "<i", "crc32": "<u"}
_MAKE_AGAIN = "Pack or index the data again"

TAR_BLOCK = 512
_MAX_HEADER_BYTES = 2**20
_SPECIAL_FILES = {
    tarfile.LNKTYPE: "a hard link; write the tar with --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link; write the tar with --dereference",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}


def read_index(store: Store, shard: Shard) -> NDArray[Any]:
    """Read the index of a shard: an array of ``_KINDS``, one row per file. Raises DataError."""
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


def write_dataset(
    store: Store,
    shards: Iterable[Iterable[tuple[str, Components]]],
    *,
    modality: Modality,
    sample_shape: Sequence[int | None],
    **spec: Any,
) -> Manifest:
    """Write shards of samples (see :func:`write_shard`), their indexes, and last the manifest.

    ``spec`` are more fields of :class:`SampleSpec`.
    """
    sample_spec = SampleSpec(modality=modality, sample_shape=list(sample_shape), **spec)
    written = [write_shard(store, f"shard-{i:06d}", samples) for i, samples in enumerate(shards)]
    return write_manifest(store, written, sample_spec)


def write_shard(store: Store, name: str, samples: Iterable[tuple[str, Components]]) -> Shard:
    """Write one tar and its index. Raises DataError.

    ``samples`` are one or more (key, components). Keys are unique, with no dot in their last part;
    components are lower case, as in WebDataset.
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


class TarDamagedError(ValueError):
    """A tar is truncated or damaged: its list of files is incomplete."""


class Walk:
    """Iterator over the members of a tar, which is sought forward only, or back by one block.

    Attributes:
        end: offset of the last end-of-archive record, after the last member.
        trailing: offset of data that is neither zeros nor another tar; None without.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, size: int) -> None:
        self._file, self._size = file, size
        self.end = 0
        self.trailing: int | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member once, in tar order. Raises TarDamagedError."""
        headers = _Headers(self._file)
        at, ended = 0, False
        while at < self._size:
            self._file.seek(at)
            block = self._file.read(TAR_BLOCK) or b""
            if not block.strip(b"\0"):
                if not ended:
                    self.end, ended = at, True
                at += TAR_BLOCK
                continue
            try:
                self._file.seek(at)
                member = tarfile.TarInfo.fromtarfile(headers)  # type: ignore[arg-type]
                if member.size < 0 or headers.offset <= at:
                    raise ValueError("negative size")
            except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as e:
                if ended:
                    self.trailing = at
                    return
                where = f"is truncated or damaged at byte {at:,} of {self._size:,}"
                what = where if at else "is not a tar, or truncated"
                raise TarDamagedError(f"{what} ({e})") from None
            stop = min(member.offset_data + member.size, headers.offset)  # links have no content
            if stop > self._size:
                where = f"{member.name} ends at byte {stop:,} of {self._size:,}"
                raise TarDamagedError(f"is truncated: {where}")
            yield member
            at, ended = headers.offset, False
        if not self._size:
            raise TarDamagedError("is not a tar, or truncated: it is empty")
        if not ended:
            raise TarDamagedError(f"is truncated: no end-of-archive record in {self._size:,} bytes")


class _Headers:
    """The parts of ``TarFile`` and its file that :class:`tarfile.TarInfo` needs."""

    encoding, errors = "utf-8", "surrogateescape"

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file, self.fileobj = file, self
        self.offset = 0
        self.pax_headers: dict[str, Any] = {}
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size) or b""


def not_a_file(member: tarfile.TarInfo) -> str:
    """Return what a member is if neither a file nor a folder, else ""."""
    if member.issparse():
        return "a sparse file; write the tar without --sparse"
    return (
        ""
        if member.isreg() or member.isdir()
        else _SPECIAL_FILES.get(member.type, "not a regular file")
    )


def trailing_data(at: int) -> str:
    """Return the reason reported for data after the end of a container."""
    return f"has data after its end at byte {at}, which is not read"
