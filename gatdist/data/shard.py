"""One shard, opened for reading: where in the tar each sample is, and what it holds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs import (
    IMAGE_COMPONENTS,
    LABEL_COMPONENT,
    POINT_COMPONENT,
    CodecError,
    decode_image,
    decode_label,
    decode_point,
)
from gatdist.data.format import Manifest, Shard, read_index
from gatdist.errors import DataError
from gatdist.storage import Store


class OpenShard:
    """A shard of n samples with its index, both checked against the manifest.

    Args:
        store: the folder.
        manifest: of the data set.
        shard: its entry for this shard.

    Attributes:
        name: of the tar.
        starts: the byte where each sample's content begins, int64 [n], and
        stops: the byte after its end.

    Raises:
        DataError: the index or the tar is not the one of the manifest, or a sample lacks a file.
    """

    def __init__(self, store: Store, manifest: Manifest, shard: Shard) -> None:
        self.name = shard.name
        self._url = f"{store.url}/{shard.name}"
        self._is_image = manifest.modality == "image"
        self._shape, self._num_classes = tuple(manifest.sample_shape), manifest.num_classes
        index = read_index(store, shard)
        size = store.size(shard.name)
        if size != shard.size:
            raise DataError(
                self._url,
                f"has {size} bytes, the manifest says {shard.size}",
                mend="Upload it again, or pack the data again",
            )
        wanted = [IMAGE_COMPONENTS if self._is_image else (POINT_COMPONENT,)]
        if self._num_classes:
            wanted.append((LABEL_COMPONENT,))
        # Rows of the index: what to decode of each sample, [n, 1], or with its label, [n, 2].
        files = [_one_file_a_sample(index, names, self._url) for names in wanted]
        self._files = np.stack(files, axis=1)
        self.starts = self._files["offset"].min(axis=1)
        self.stops = (self._files["offset"] + self._files["size"]).max(axis=1)

    def decode(self, i: int, start: int, data: bytes) -> tuple[NDArray[Any], int]:
        """Decode a sample out of a piece of the tar.

        Args:
            i: number of the sample in this shard.
            start: the byte of the tar where ``data`` begins.
            data: bytes that hold the sample.

        Returns:
            The sample, uint8 [H, W, C] or float32 [d], and its class (0 where there are none).

        Raises:
            CodecError: it is damaged, or not what the manifest says.
        """
        file, *labels = self._files[i]
        try:
            content = _checked(file, start, data)
            if self._is_image:
                channels, height, width = self._shape
                sample: NDArray[Any] = decode_image(content, (channels, height, width))
            else:
                sample = decode_point(content, self._shape)
            if not labels:
                return sample, 0
            file = labels[0]
            return sample, decode_label(_checked(file, start, data), self._num_classes)
        except CodecError as error:
            name = f"{file['key'].decode()}.{file['component'].decode()}"
            problem = f"sample {name} at byte {file['offset']} {error}"
            raise CodecError(problem, error.mend) from error

    def decode_again(self, i: int, data: bytes) -> tuple[NDArray[Any], int]:
        """Decode a sample that was damaged, out of its bytes fetched anew.

        Raises:
            DataError: it still is; names shard, key and offset, what was expected and found.
        """
        try:
            return self.decode(i, int(self.starts[i]), data)
        except CodecError as error:
            raise DataError(self._url, f"{error}; fetched twice", mend=error.mend) from error


def _checked(file: NDArray[Any], start: int, data: bytes) -> bytes:
    """The content of one file, its CRC checked."""
    begin = int(file["offset"]) - start
    content = data[begin : begin + int(file["size"])]
    found, expected = zlib.crc32(content), int(file["crc32"])
    if found != expected:
        raise CodecError(f"has CRC-32 {found:08x}, expected {expected:08x}")
    return content


def _one_file_a_sample(index: NDArray[Any], wanted: Sequence[str], url: str) -> NDArray[Any]:
    """The rows of ``index`` with a wanted component, which every sample must have once, [n]."""
    begins = np.ones(len(index), dtype=bool)  # whether a row is the first of its sample
    begins[1:] = index["key"][1:] != index["key"][:-1]
    sample_of_row = np.cumsum(begins) - 1
    chosen = np.flatnonzero(np.isin(index["component"], [name.encode() for name in wanted]))
    counts = np.bincount(sample_of_row[chosen], minlength=int(begins.sum()))
    wrong = np.flatnonzero(counts != 1)
    if wrong.size:
        key = index["key"][begins][wrong[0]].decode()
        raise DataError(
            url,
            f"sample {key} has {counts[wrong[0]]} files .{' or .'.join(wanted)}, expected 1",
            mend="Mend the sample or take it out, and pack again",
        )
    rows: NDArray[Any] = index[chosen]
    return rows
