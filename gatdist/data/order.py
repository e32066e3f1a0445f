"""The order of samples: a pure function of (seed, position).

Position counts the samples that all workers of the run have used so far.

::

    epoch, q    = divmod(position, N)
    row, stream = divmod(q, L)
    u           = start(stream) + permute_window(seed, epoch, stream, row)
    sample      = lookup(permute_blocks(seed, epoch), u)

A block is a group of neighbouring samples of one shard, fetched with one read. Each epoch puts the
blocks in a new order and cuts this sequence of samples into L streams (``data.interleave``) of
(nearly) equal length. Every L positions advance each stream by one sample, and samples are shuffled
in windows within a stream. Hence each epoch uses every sample once, a batch mixes L distant places,
and few blocks are in use at a time. The order does not depend on the number of workers or threads,
and has no state beyond the position.

Hash and permutation are implemented here, so that no library version changes the order;
``ORDER_VERSION`` fixes what they compute.

Legend: N samples, L streams, k positions, b blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gatdist.config import Config
from gatdist.parallel.tree import bit_reversed, leaves_of

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

ORDER_VERSION = 1

_STREAMS_PERCENT_OF_BLOCKS = 6  # upper bound: a stream has many blocks per epoch
_BLOCKS_PER_WINDOW = 4  # a window mixes distant places
_MAX_BLOCKS = 2**19  # larger data sets have larger blocks
_WINDOWS_BYTES = 256 * 2**20  # of all streams together
_MAX_WINDOW = 4096
_ROUNDS = 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WINDOWS, _BLOCKS, _SUBSTITUTES = 1, 2, 3  # purposes of a hash


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


class SampleOrder:
    """Maps positions of a run to samples.

    Args:
        block_sizes: samples in each block, [b], each ≥ 1; see :meth:`ShardLayout.cut_blocks`.
        seed: of the run, in [0, 2⁶³).
        interleave: L ≥ 1; may exceed N.
        window: samples of one stream that are shuffled together, ≥ 1.
        block_bytes: for :meth:`state` only, as ``fingerprint``.
    """

    def __init__(
        self,
        block_sizes: ArrayLike,
        *,
        seed: int,
        interleave: int,
        window: int,
        block_bytes: int = 0,
        fingerprint: str = "",
    ) -> None:
        self._sizes = np.asarray(block_sizes, dtype=np.int32)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        self.num_samples, self.num_blocks = int(self._ends[-1]), len(self._sizes)
        self.longest_block = int(self._sizes.max())
        self.seed, self.interleave, self.window = seed, interleave, window
        self._block_bytes, self._fingerprint = block_bytes, fingerprint
        # A batch spans at most two epochs.
        self._laid_out = lru_cache(maxsize=2)(self._lay_out_blocks)

    @classmethod
    def from_config(
        cls, config: Config, layout: ShardLayout, seed: int | None = None
    ) -> SampleOrder:
        """Return the order of a run, which depends on its configuration and data alone.

        Blocks are smaller than ``data.block_bytes`` if the data set or a window has too few.
        ``seed`` is that of the run by default.
        """
        interleave = config.interleave
        window = config.data.shuffle_window_samples or fitting_window(layout, interleave)
        window_bytes = window * layout.num_bytes // layout.num_samples
        # The largest power of two that is not above a window's share, or 1.
        most = 1 << max(0, (window_bytes // _BLOCKS_PER_WINDOW).bit_length() - 1)
        block_bytes = fitting_block_bytes(layout, min(config.data.block_bytes, most), interleave)
        return cls(
            layout.cut_blocks(block_bytes),
            seed=config.run.seed if seed is None else seed,
            interleave=interleave,
            window=window,
            block_bytes=block_bytes,
            fingerprint=layout.fingerprint,
        )

    def indices(self, positions: ArrayLike) -> Indices:
        """Return the sample index at each position; both int64 [k], in any order."""
        epochs, q = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        rows, streams = np.divmod(q, self.interleave)
        # The first `longer` streams have one sample more than the others.
        length, longer = divmod(self.num_samples, self.interleave)
        # `places` count along the reordered blocks, stream after stream.
        places = streams * length + np.minimum(streams, longer)
        places += self._shuffled_rows(epochs, streams, rows, length + (streams < longer))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._lookup(int(epoch), places[here])
        return samples

    def blocks_of(self, samples: Indices) -> tuple[Indices, Indices]:
        return block_bounds(samples, self._ends)

    def state(self) -> dict[str, Any]:
        """Return the parameters as JSON values. Resuming a run requires an equal state."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "interleave": self.interleave,
            "window": self.window,
            "block_bytes": self._block_bytes,
            "fingerprint": self._fingerprint,
        }

    def _shuffled_rows(
        self, epochs: Indices, streams: Indices, rows: Indices, lengths: Indices
    ) -> Indices:
        """Shuffle rows in the windows of their streams; a stream's last window may be shorter."""
        windows, inside = np.divmod(rows, self.window)
        first = windows * self.window
        keys = hash_words(self.seed, _WINDOWS, epochs, streams, windows)
        return first + permute(inside, np.minimum(self.window, lengths - first), keys)

    def _lookup(self, epoch: int, places: Indices) -> Indices:
        layout, ends = self._laid_out(epoch)
        at = np.searchsorted(ends, places, side="right")
        # The distance to the end of the block is the same in the data set.
        return self._ends[layout[at]] - (ends[at] - places)

    def _lay_out_blocks(self, epoch: int) -> tuple[NDArray[np.int32], Indices]:
        keys = hash_words(self.seed, _BLOCKS, epoch, np.arange(len(self._sizes)))
        layout = np.argsort(keys, kind="stable").astype(np.int32)
        return layout, np.cumsum(self._sizes[layout], dtype=np.int64)


@dataclass(frozen=True)
class WorkerShare:
    """Samples of one worker, at the same places of every global batch.

    Worker r of W has the places r, r + W, …. With virtual workers it has those of neighbouring
    leaves of the tree (:func:`~gatdist.parallel.tree.leaves_of`), v, v + L, … of virtual worker v.
    """

    position: int  # where the run begins or resumes
    global_batch: int
    rank: int
    world_size: int  # at most global_batch; at most virtual_workers, if there are any
    batches: int = 1  # global batches per step
    virtual_workers: int = 0  # L; 0 unless the reduction is canonical

    @classmethod
    def from_config(cls, config: Config, rank: int, world_size: int, position: int = 0) -> Self:
        run = config.run
        virtual = run.virtual_workers if run.reduction == "canonical" else 0
        batches = config.game.num_discriminator_steps
        return cls(position, run.global_batch, rank, world_size, batches, virtual)

    @cached_property
    def places(self) -> Indices:
        """Places of this worker's samples in a global batch, ascending."""
        every = np.arange(self.global_batch)
        if not self.virtual_workers:
            return every[self.rank :: self.world_size]
        order = bit_reversed(self.virtual_workers)
        leaves = leaves_of(self.rank, self.world_size, self.virtual_workers)
        mine = [order[leaf] for leaf in leaves]
        return every[np.isin(every % self.virtual_workers, mine)]

    @property
    def local_batch(self) -> int:
        """Samples per step."""
        return len(self.places) * self.batches

    def positions(self, begin: int, end: int) -> Indices:
        batches, samples = np.divmod(np.arange(begin, end), len(self.places))
        return self.position + batches * self.global_batch + self.places[samples]

    def samples_before(self, position: int) -> int:
        batches, place = divmod(position - self.position, self.global_batch)
        return batches * len(self.places) + int(np.searchsorted(self.places, place))

    def streams(self, interleave: int) -> tuple[int, bool]:
        """Return how many streams it reads, and whether other workers read some of them, too."""
        period = math.lcm(self.global_batch, interleave)
        positions = self.positions(0, period // self.global_batch * len(self.places))
        count = len(np.unique(positions % interleave))
        return count, len(positions) < count * (period // interleave)


def substitute(sample: int, attempt: int, num_samples: int) -> int:
    """Return the sample that replaces an unreadable one; ``attempt`` counts bad substitutes."""
    keys = hash_words(_SUBSTITUTES, attempt)
    return int(permute(np.array([sample]), np.array([num_samples]), keys)[0])


def fitting_window(layout: ShardLayout, interleave: int) -> int:
    """Return the samples per stream for which all windows take 256 MiB, 1 to 4,096."""
    fitting = layout.samples_within(_WINDOWS_BYTES) // interleave
    return max(1, min(fitting, _MAX_WINDOW))


def fitting_block_bytes(layout: ShardLayout, block_bytes: int, interleave: int) -> int:
    """Halve ``block_bytes`` until L / b is below 6 %; double it above 2¹⁹ blocks."""
    while block_bytes > 1:
        blocks = int(layout.num_blocks(block_bytes).sum())
        if 100 * interleave < _STREAMS_PERCENT_OF_BLOCKS * blocks or blocks == layout.num_samples:
            break
        block_bytes //= 2
    most = max(_MAX_BLOCKS, len(layout))  # no block spans two shards
    while layout.num_blocks(block_bytes).sum() > most:
        block_bytes *= 2
    return block_bytes


def permute(values: Indices, sizes: Indices, keys: _Words) -> Indices:
    """Evaluate a pseudorandom permutation of {0, …, size − 1} at int64 ``values`` [k].

    A Feistel network over two digits, ``left`` < ``width`` and ``right`` < ``height``, where
    width · height ≥ size, repeated until the result is below size (the generalized Feistel cipher
    with cycle-walking of Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Keys
    (uint64) and sizes (int64, ≥ 1), both [k], select the permutation.
    """
    size = sizes.astype(np.uint64)
    width = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    height = (size + width - np.uint64(1)) // width
    result = values.astype(np.uint64)
    todo = np.arange(len(result))
    while todo.size:
        result[todo] = _feistel(result[todo], width[todo], height[todo], keys[todo])
        todo = todo[result[todo] >= size[todo]]
    return result.astype(np.int64)


def _feistel(values: _Words, width: _Words, height: _Words, keys: _Words) -> _Words:
    left, right = np.divmod(values, height)
    for i in range(_ROUNDS):
        left = (left + _round(keys, 2 * i, right) % width) % width
        right = (right + _round(keys, 2 * i + 1, left) % height) % height
    return left * height + right


def _round(keys: _Words, number: int, digit: _Words) -> _Words:
    return _mix(keys + (digit * np.uint64(2 * _ROUNDS) + np.uint64(number + 1)) * _GOLDEN)


def hash_words(*words: ArrayLike) -> _Words:
    """Return a 64-bit hash of integers, elementwise with broadcasting; uint64, at least 1-D."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        # At least 1-D: NumPy warns of overflow in scalars, which is intended here.
        term = np.atleast_1d(np.asarray(word)).astype(np.uint64) + np.uint64(1)
        state = _mix(state + term * _GOLDEN)
    return state


def _mix(x: _Words) -> _Words:
    """Apply the finalizer of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
