"""One shard, opened for reading: where in the tar each sample is, and what it holds."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError, decode_label
from gatdist.data.format import Manifest, Shard, read_index
from gatdist.data.modalities import MODALITIES, Decode
from gatdist.storage import Store

_FIELDS = ("offset", "size", "crc32")


class OpenShard:
    """A shard of n samples with its index, both checked against the manifest.

    Args:
        tars: the folder of the tars, and
        indexes: that of the indexes, with the manifest.
        manifest: of the data set.
        shard: its entry for this shard.
        decode: decodes the file of a sample.

    Attributes:
        name: of the tar.
        starts: the byte where each sample's content begins, int64 [n], and
        stops: the byte after its end.

    Raises:
        DataError: the index or the tar is not the one of the manifest, or a sample lacks a file.
    """

    def __init__(
        self, tars: Store, indexes: Store, manifest: Manifest, shard: Shard, decode: Decode
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
        component = manifest.component
        requested = [(component,) if component else MODALITIES[manifest.modality].components]
        if self._num_classes:
            requested.append((manifest.label_component,))
        # Rows of the index: what to decode of each sample, and then its label.
        self._rows = [_one_file_a_sample(index, names, self._url) for names in requested]
        # What reading needs of them, without NumPy's scalars, which take a microsecond each.
        self._files = [
            tuple(array("q", rows[field].astype(np.int64).tobytes()) for field in _FIELDS)
            for rows in self._rows
        ]
        ends = [rows["offset"] + rows["size"] for rows in self._rows]
        self.starts = np.min([rows["offset"] for rows in self._rows], axis=0)
        self.stops = np.max(ends, axis=0)

    @property
    def num_bytes(self) -> int:
        """Memory of the index."""
        files = sum(len(column) * column.itemsize for columns in self._files for column in columns)
        rows = sum(rows.nbytes for rows in self._rows)
        return int(files + rows + self.starts.nbytes + self.stops.nbytes)

    def span(self, first: int, end: int) -> tuple[int, int]:
        """The bytes of samples ``first`` to ``end``, from the first to one past the last."""
        return int(self.starts[first]), int(self.stops[end - 1])

    def decode_into(self, i: int, start: int, data: bytes | memoryview, out: NDArray[Any]) -> int:
        """Decode a sample out of a piece of the tar.

        Args:
            i: number of the sample in this shard.
            start: the byte of the tar where ``data`` begins.
            data: bytes that hold the sample.
            out: memory for it; see :func:`~gatdist.data.modalities.new_samples`.

        Returns:
            Its class, 0 where there are none.

        Raises:
            CodecError: it is damaged, or not what the manifest says.
        """
        try:
            self._decode(self._checked(0, i, start, data), out)
        except CodecError as error:
            raise self._named(error, 0, i) from error
        if not self._num_classes:
            return 0
        try:
            content = self._checked(1, i, start, data)
            return decode_label(content, self._num_classes, self._label_field, self._numbers)
        except CodecError as error:
            raise self._named(error, 1, i) from error

    def _named(self, error: CodecError, part: int, i: int) -> CodecError:
        file = self._rows[part][i]
        name = f"{file['key'].decode()}.{file['component'].decode()}"
        return CodecError(f"sample {name} at byte {file['offset']} {error}", error.hint)

    def check(
        self, i: int, start: int, data: bytes | memoryview, check: Callable[[bytes], object]
    ) -> None:
        """Call ``check`` with the file of a sample; see :meth:`decode_into`. Raises CodecError."""
        try:
            check(bytes(self._checked(0, i, start, data)))
        except CodecError as error:
            raise self._named(error, 0, i) from error

    def decode_again(self, i: int, data: bytes, out: NDArray[Any]) -> int:
        """Decode a sample that was damaged, out of its bytes fetched anew.

        Raises:
            DataError: it still is; names shard, key and offset, what was expected and found.
        """
        try:
            return self.decode_into(i, int(self.starts[i]), data, out)
        except CodecError as error:
            raise DataError(self._url, f"{error}; fetched twice", hint=error.hint) from error

    def _checked(
        self, part: int, i: int, start: int, data: bytes | memoryview
    ) -> bytes | memoryview:
        """The content of one file, its CRC checked."""
        offsets, sizes, crcs = self._files[part]
        begin = offsets[i] - start
        content = data[begin : begin + sizes[i]]  # a copy, which is cheaper than a view of bytes
        found = crc32(content)
        if found != crcs[i]:
            raise CodecError(f"has CRC-32 {found:08x}, expected {crcs[i]:08x}")
        return content


def _one_file_a_sample(index: NDArray[Any], requested: Sequence[str], url: str) -> NDArray[Any]:
    """The rows of ``index`` with a wanted component, which every sample must have once, [n]."""
    begins = np.ones(len(index), dtype=bool)  # whether a row is the first of its sample
    begins[1:] = index["key"][1:] != index["key"][:-1]
    sample_of_row = np.cumsum(begins) - 1
    chosen = np.flatnonzero(np.isin(index["component"], [name.encode() for name in requested]))
    counts = np.bincount(sample_of_row[chosen], minlength=int(begins.sum()))
    wrong = np.flatnonzero(counts != 1)
    if wrong.size:
        key = index["key"][begins][wrong[0]].decode()
        raise DataError(
            url,
            f"sample {key} has {counts[wrong[0]]} files .{' or .'.join(requested)}, expected 1",
            hint="Fix the sample or take it out, and pack or index again",
        )
    rows: NDArray[Any] = index[chosen]
    return rows
