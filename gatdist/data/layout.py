"""Sizes of a data set's shards, the basis of sample order and memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class ShardLayout:
    """Sizes of the shards of a data set, given as (samples, bytes), each with one sample or more.

    ``begins`` and ``ends`` are the index of the first sample of each shard, and one past its last.
    """

    def __init__(self, shards: Sequence[tuple[int, int]], fingerprint: str = "") -> None:
        self._samples, self._bytes = np.array(shards, dtype=np.int64).T
        self.fingerprint = fingerprint
        self.num_samples, self.num_bytes = int(self._samples.sum()), int(self._bytes.sum())
        self.ends = np.cumsum(self._samples)
        self.begins = self.ends - self._samples
        self.mean_bytes = np.maximum(1, self._bytes // self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def shard_of(self, indices: Indices) -> Indices:
        return np.searchsorted(self.ends, indices, side="right")

    def num_blocks(self, block_bytes: int) -> Indices:
        return np.clip(-(-self._bytes // block_bytes), 1, self._samples)

    def cut_blocks(self, block_bytes: int) -> NDArray[np.int32]:
        """Return int32 [blocks]: samples per block, of at most ``block_bytes`` bytes on average."""
        blocks = self.num_blocks(block_bytes)
        length, longer = np.divmod(self._samples, blocks)
        # The first `longer` blocks of a shard have one sample more than its others.
        place = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        sizes = np.repeat(length, blocks) + (place < np.repeat(longer, blocks))
        return sizes.astype(np.int32)

    def samples_within(self, num_bytes: int) -> int:
        """Return how many samples, whichever they are, take at most ``num_bytes``."""
        samples, means = self._heaviest_first()
        ends = np.cumsum(samples * means)
        shard = int(np.searchsorted(ends, num_bytes, side="right"))  # the first that does not fit
        if shard == len(samples):
            return self.num_samples
        left = num_bytes - (ends[shard - 1] if shard else 0)
        return int(samples[:shard].sum() + left // means[shard])

    def bytes_of(self, num_samples: int) -> int:
        """Return the most bytes of ``num_samples``, assuming equal sizes within each shard."""
        samples, means = self._heaviest_first()
        before = np.cumsum(samples) - samples
        return int((np.clip(num_samples - before, 0, samples) * means).sum())

    def _heaviest_first(self) -> tuple[Indices, NDArray[np.float64]]:
        means = self._bytes / self._samples
        order = np.argsort(-means, kind="stable")
        return self._samples[order], means[order]


def block_bounds(samples: Indices, ends: Indices) -> tuple[Indices, Indices]:
    """Return first sample and end of the block of each sample; ``ends`` of blocks are ascending."""
    blocks = np.searchsorted(ends, samples, side="right")
    begins = np.concatenate(([0], ends[:-1]))
    return begins[blocks], ends[blocks]
