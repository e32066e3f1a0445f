"""Shards opened for reading: position of each sample in the tar, and decoding."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.labels import decode_label
from gatdist.data.format.manifest import Manifest, Shard
from gatdist.data.format.shard_files import read_index
from gatdist.data.modalities import Decode, components_of
from gatdist.storage import Store

_FIELDS = ("offset", "size", "crc32")


class OpenShard:
    """A shard of n samples with its index, both checked against the manifest. Raises DataError.

    ``chosen`` returns whether samples belong to it by their keys; by default, all do.
    ``starts`` and ``stops`` are the byte offsets of each sample, int64 [n].
    """

    def __init__(
        self,
        tars: Store,
        indexes: Store,
        manifest: Manifest,
        shard: Shard,
        decode: Sequence[Decode],
        chosen: Callable[[NDArray[Any]], NDArray[np.bool_]] | None = None,
    ) -> None:
        self.name = shard.name
        self._url = f"{tars.url}/{shard.name}"
        self._decode, self._num_classes = decode, manifest.num_classes
        self._label_field = manifest.label_field
        names = manifest.class_names if manifest.named_labels else None
        self._numbers = {name: i for i, name in enumerate(names)} if names else None
        index = read_index(indexes, shard)
        size = tars.size(shard.name)
        if size != shard.size:
            raise DataError(
                self._url,
                f"has {size} bytes, the manifest says {shard.size}",
                hint="Restore it from a copy, or pack or index the data again",
            )
        requested = [
            components_of(field.modality, field.component)
            for field in (manifest, *(manifest.fields or {}).values())
        ]
        if self._num_classes:
            requested.append((manifest.label_component,))
        # Index rows of samples, of each field, and of their labels.
        self._rows = [_one_file_per_sample(index, names, self._url) for names in requested]
        if chosen is not None:
            keeps = chosen(self._rows[0]["key"])
            self._rows = [rows[keeps] for rows in self._rows]
        # Their fields for reading: access to a NumPy scalar takes a microsecond.
        self._files = [
            tuple(array("q", rows[field].astype(np.int64).tobytes()) for field in _FIELDS)
            for rows in self._rows
        ]
        self.starts = np.min([rows["offset"] for rows in self._rows], axis=0)
        self.stops = np.max([rows["offset"] + rows["size"] for rows in self._rows], axis=0)

    @property
    def num_bytes(self) -> int:
        files = sum(len(column) * column.itemsize for columns in self._files for column in columns)
        rows = sum(rows.nbytes for rows in self._rows)
        return int(files + rows + self.starts.nbytes + self.stops.nbytes)

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Return the byte range of samples ``first`` to ``end`` (exclusive)."""
        return int(self.starts[first]), int(self.stops[end - 1])

    def decode_into(self, i: int, start: int, data: bytes | memoryview, out: NDArray[Any]) -> int:
        """Decode sample ``i`` into ``out``, return its class (0 if unlabelled). Raises CodecError.

        ``data`` includes the sample, and begins at offset ``start`` in the tar.
        """
        part = 0
        try:
            for part, decode in enumerate(self._decode):
                decode(self._checked(part, i, start, data), out)
            if not self._num_classes:
                return 0
            part = len(self._decode)
            content = self._checked(part, i, start, data)
            return decode_label(content, self._num_classes, self._label_field, self._numbers)
        except CodecError as error:
            raise self._named(error, part, i) from error

    def _named(self, error: CodecError, part: int, i: int) -> CodecError:
        file = self._rows[part][i]
        name = f"{file['key'].decode()}.{file['component'].decode()}"
        return CodecError(f"sample {name} at byte {file['offset']} {error}", error.hint)

    def check(
        self,
        i: int,
        start: int,
        data: bytes | memoryview,
        checks: Sequence[Callable[[bytes], object]],
    ) -> None:
        """Apply a check to the file of each field of sample ``i``. Raises CodecError."""
        for part, check in enumerate(checks):
            try:
                check(bytes(self._checked(part, i, start, data)))
            except CodecError as error:
                raise self._named(error, part, i) from error

    def decode_again(self, i: int, data: bytes, out: NDArray[Any]) -> int:
        """Decode a damaged sample from its bytes, fetched again. Raises DataError."""
        try:
            return self.decode_into(i, int(self.starts[i]), data, out)
        except CodecError as error:
            raise DataError(self._url, f"{error}; fetched twice", hint=error.hint) from error

    def _checked(
        self, part: int, i: int, start: int, data: bytes | memoryview
    ) -> bytes | memoryview:
        offsets, sizes, crcs = self._files[part]
        begin = offsets[i] - start
        content = data[begin : begin + sizes[i]]  # copying is cheaper than a view
        found = crc32(content)
        if found != crcs[i]:
            raise CodecError(f"has CRC-32 {found:08x}, expected {crcs[i]:08x}")
        return content


def _one_file_per_sample(index: NDArray[Any], requested: Sequence[str], url: str) -> NDArray[Any]:
    """Return the rows of ``index`` with a requested component, which each sample has once, [n]."""
    begins = np.ones(len(index), dtype=bool)  # whether a row is the first of its sample
    begins[1:] = index["key"][1:] != index["key"][:-1]
    sample_of_row = np.cumsum(begins) - 1
    chosen = np.flatnonzero(np.isin(index["component"], [name.encode() for name in requested]))
    counts = np.bincount(sample_of_row[chosen], minlength=int(begins.sum()))
    wrong = np.flatnonzero(counts != 1)
    if wrong.size:
        key = index["key"][begins][wrong[0]].decode()
        rule = f"sample {key} has {counts[wrong[0]]} files .{' or .'.join(requested)}, expected 1"
        raise DataError(url, rule, hint="Fix or remove the sample, and pack or index again")
    rows: NDArray[Any] = index[chosen]
    return rows


class OpenShards:
    """Cache of open shards by number, thread-safe. The last one may exceed ``max_bytes``."""

    def __init__(self, open_shard: Callable[[int], OpenShard], max_bytes: int) -> None:
        self._open, self._max_bytes = open_shard, max_bytes
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._num_bytes = 0
        self._being_opened: set[int] = set()
        self._changed = threading.Condition()

    def __getitem__(self, number: int) -> OpenShard:
        with self._changed:
            while number in self._being_opened:
                self._changed.wait()
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
            self._being_opened.add(number)
        try:
            shard = self._open(number)
            with self._changed:
                self._shards[number] = shard
                self._num_bytes += shard.num_bytes
                while self._num_bytes > self._max_bytes and len(self._shards) > 1:
                    _, closed = self._shards.popitem(last=False)
                    self._num_bytes -= closed.num_bytes
            return shard
        finally:
            with self._changed:
                self._being_opened.remove(number)
                self._changed.notify_all()
