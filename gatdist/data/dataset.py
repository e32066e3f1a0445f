"""A data set of shards, read by sample number.

Bytes are fetched in blocks, neighbouring samples of one shard, and the blocks used last are kept in
memory. A data set that is small when decoded is decoded once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gatdist.config import DataConfig
from gatdist.data import builtin
from gatdist.data.caches import BlockCache, DecodedSamples, Samples
from gatdist.data.codecs import CodecError
from gatdist.data.format import Manifest, read_manifest
from gatdist.data.order import Indices, cut_blocks, fitting_block_bytes
from gatdist.data.shard import OpenShard
from gatdist.errors import DataError
from gatdist.storage import Store

_BLOCK_CACHE_BYTES = 512 * 2**20
_DECODED_BYTES = 64 * 2**20
_DEFAULT_LANES = 64


def open_dataset(config: DataConfig) -> Dataset:
    """Open the data set that the section ``data`` of a configuration names.

    ``builtin:digits`` and ``builtin:ring`` are written to the cache folder on first use. Shards are
    looked at when their samples are first read.

    Raises:
        DataError: there is no data set, it is empty or damaged, or its pictures are not of
            ``data.resolution``.
        StorageError: the URL can't be read, or the cache folder not written.
    """
    url = builtin.prepare(config.url) if config.url.startswith(builtin.PREFIX) else config.url
    return Dataset(Store(url, config.storage_options), config)


class Dataset:
    """Samples by number, 0 to ``num_samples`` − 1. Safe to read from several threads.

    Args:
        store: the folder of the shards.
        config: how to read.
        block_cache_bytes: bound of the memory for fetched blocks.
        decoded_bytes: a data set whose decoded samples take no more than this is kept decoded.

    Attributes:
        num_samples: N.
        num_shards: tars.
        num_bytes: of all tars.
        fingerprint: SHA-256 (hex) of the content and its order.
        sample_shape: (C, H, W) of images, (n,) of points.
        num_classes: 0 where there are no labels.
        is_image: images, or else points.
        shard_sizes: (samples, bytes) of each shard.
    """

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        *,
        block_cache_bytes: int = _BLOCK_CACHE_BYTES,
        decoded_bytes: int = _DECODED_BYTES,
    ) -> None:
        manifest = read_manifest(store)
        _require_resolution(config.resolution, manifest, store.url)
        self.num_samples = manifest.num_samples
        self.num_shards = len(manifest.shards)
        self.num_bytes = sum(shard.size for shard in manifest.shards)
        self.fingerprint = manifest.fingerprint
        self.sample_shape = tuple(manifest.sample_shape)
        self.num_classes = manifest.num_classes
        self.is_image = manifest.modality == "image"
        self.shard_sizes = [(shard.num_samples, shard.size) for shard in manifest.shards]

        self._store, self._manifest = store, manifest
        self._shard_ends = np.cumsum([shard.num_samples for shard in manifest.shards])
        self._opened = lru_cache(maxsize=None)(self._open_shard)
        self._block_ends = np.cumsum(self._blocks(config, block_cache_bytes))
        self._blocks_kept = BlockCache(block_cache_bytes)
        self._lock = threading.Lock()
        self._decoded: DecodedSamples | None = None
        if self._new_samples(1).nbytes * self.num_samples <= decoded_bytes:
            self._decoded = DecodedSamples(
                self._new_samples(self.num_samples), self._new_labels(self.num_samples)
            )

    def read(
        self, indices: Indices, executor: Executor | None = None
    ) -> tuple[Samples, Indices | None]:
        """Read and decode samples.

        Args:
            indices: int64 [n], each in [0, N), in any order, also repeated.
            executor: decodes in its threads; None decodes in this one.

        Returns:
            The samples in the order asked, uint8 [n, H, W, C] or float32 [n, d], and their labels,
            int64 [n], or None where there are no classes. The arrays are the caller's.

        Raises:
            DataError: a sample is damaged or not what the manifest says.
            StorageUnavailableError: storage kept failing.
        """
        indices = np.asarray(indices, dtype=np.int64)
        with self._lock:
            if self._decoded is None:
                return self._read(indices, executor)
            missing = self._decoded.missing(indices)
            if missing.size:
                self._decoded.put(missing, *self._read(missing, executor))
                if self._decoded.is_full:
                    self._blocks_kept.clear()
            return self._decoded.get(indices)

    def _read(self, indices: Indices, executor: Executor | None) -> tuple[Samples, Indices | None]:
        blocks = np.searchsorted(self._block_ends, indices, side="right")
        content = self._fetch(np.unique(blocks).tolist())
        samples, labels = self._new_samples(len(indices)), self._new_labels(len(indices))

        def decode(i: int) -> None:
            start, data = content[int(blocks[i])]
            label = self._decode(int(indices[i]), start, data, samples[i])
            if labels is not None:
                labels[i] = label

        # `list` waits for all, and raises the first error.
        list((executor.map if executor else map)(decode, range(len(indices))))
        return samples, labels

    def _fetch(self, blocks: Sequence[int]) -> dict[int, tuple[int, bytes]]:
        """For each block the offset in its shard where it begins, and its bytes."""
        missing = [block for block in blocks if block not in self._blocks_kept]
        ranges = [self._block_range(block) for block in missing]
        fetched = dict(zip(missing, self._store.read_ranges(ranges), strict=True))
        content = {
            block: fetched[block] if block in fetched else self._blocks_kept.get(block)
            for block in blocks
        }
        for block in missing:
            self._blocks_kept.put(block, fetched[block])
        return {block: (self._block_range(block)[1], data) for block, data in content.items()}

    def _block_range(self, block: int) -> tuple[str, int, int]:
        first = int(self._block_ends[block - 1]) if block else 0
        shard, begin = self._locate(first)
        end = begin + int(self._block_ends[block]) - first
        return shard.name, int(shard.starts[begin]), int(shard.stops[end - 1])

    def _decode(self, index: int, start: int, data: bytes, out: Samples) -> int:
        """One sample of a block that begins at byte ``start``; fetched once more if damaged."""
        shard, i = self._locate(index)
        try:
            return shard.decode_into(i, start, data, out)
        except CodecError:
            again = [(shard.name, int(shard.starts[i]), int(shard.stops[i]))]
            return shard.decode_again(i, self._store.read_ranges(again)[0], out)

    def _locate(self, index: int) -> tuple[OpenShard, int]:
        """The shard that holds a sample, and the sample's number in it."""
        number = int(np.searchsorted(self._shard_ends, index, side="right"))
        first = self._shard_ends[number] - self._manifest.shards[number].num_samples
        return self._opened(number), int(index - first)

    def _open_shard(self, number: int) -> OpenShard:
        return OpenShard(self._store, self._manifest, self._manifest.shards[number])

    def _blocks(self, config: DataConfig, cache_bytes: int) -> NDArray[np.int32]:
        """Samples in each block; one, where blocks can't be kept until all in them was used."""
        if self.num_bytes <= cache_bytes:
            return cut_blocks(self.shard_sizes, config.block_bytes)
        lanes = config.lanes or _DEFAULT_LANES
        block_bytes = fitting_block_bytes(self.shard_sizes, config.block_bytes, lanes)
        # In each lane one window is open, which may begin and end inside a block.
        window_bytes = (
            config.window_samples or 4096
        ) * self.num_bytes // self.num_samples + 2 * block_bytes
        keeps = lanes * window_bytes <= cache_bytes
        return cut_blocks(self.shard_sizes, block_bytes if keeps else 1)

    def _new_samples(self, count: int) -> Samples:
        if not self.is_image:
            return np.empty((count, *self.sample_shape), dtype=np.float32)
        channels, height, width = self.sample_shape
        return np.empty((count, height, width, channels), dtype=np.uint8)

    def _new_labels(self, count: int) -> Indices | None:
        return np.empty(count, dtype=np.int64) if self.num_classes else None


def _require_resolution(resolution: int | list[int] | None, manifest: Manifest, url: str) -> None:
    if resolution is None:
        return
    if manifest.modality != "image":
        raise DataError(
            "data.resolution",
            f"{url} holds {manifest.modality}",
            value=resolution,
            mend="Leave data.resolution out",
        )
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    _, *found = manifest.sample_shape
    if found != [height, width]:
        raise DataError(
            "data.resolution",
            f"the pictures in {url} are {found[0]} × {found[1]} (height × width)",
            value=resolution,
            mend=f"Pack again with --size {height}x{width}, or set data.resolution = {found}",
        )
