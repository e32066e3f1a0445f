"""The order of samples: a pure function of (seed, position).

Position counts the samples shown by the run so far, on all workers together.

::

    epoch, q  = divmod(position, N)
    row, lane = divmod(q, L)
    u         = start(lane) + permute_window(seed, epoch, lane, row)
    sample    = lookup(permute_blocks(seed, epoch), u)

The samples stand in blocks: neighbours in one shard, so that one read fetches them together. Each
epoch lays the blocks out in a new order and cuts the row of samples into L lanes of (nearly) equal
length. Every L positions the run takes one step forward in each lane, and within a lane samples are
shuffled in windows. Hence each epoch shows every sample once, a batch mixes L distant places, and
only a few blocks are in use at a time. Nothing depends on the number of workers or threads, and
there is no state beyond the position.

The hash and the permutation are our own, so that the order never changes with a library; what they
compute is fixed by ``ORDER_VERSION``.

Legend: N samples, L lanes, k positions, b blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gatdist.config import Config

if TYPE_CHECKING:
    from gatdist.data.dataset import Dataset

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

ORDER_VERSION = 1

# A lane should pass through many blocks an epoch: lanes / blocks stays below this many per cent.
_LANES_PERCENT_OF_BLOCKS = 6
# And through several in each window, so that a window mixes distant places.
_BLOCKS_A_WINDOW = 4
# The table of blocks stays small; blocks of a huge data set are larger instead.
_MOST_BLOCKS = 2**19
# The windows of all lanes are in memory together, and those that follow them are being fetched.
_WINDOWS_BYTES = 256 * 2**20
_LONGEST_WINDOW = 4096
_ROUNDS = 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WINDOWS, _BLOCKS, _SUBSTITUTES = 1, 2, 3  # what a hash is used for


class SampleOrder:
    """Which sample stands at which position of the run.

    Args:
        block_sizes: samples in each block, in the order of the data set, [b], each ≥ 1; see
            :func:`cut_blocks`.
        seed: of the run, in [0, 2⁶³).
        lanes: L ≥ 1; may exceed N.
        window: samples of one lane that are shuffled together, ≥ 1.
        block_bytes: what the blocks were cut by; only for :meth:`state`, as is
        fingerprint: of the data set.
    """

    def __init__(
        self,
        block_sizes: ArrayLike,
        *,
        seed: int,
        lanes: int,
        window: int,
        block_bytes: int = 0,
        fingerprint: str = "",
    ) -> None:
        self._sizes = np.asarray(block_sizes, dtype=np.int32)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        self.num_samples = int(self._ends[-1])
        self.seed, self.lanes, self.window = seed, lanes, window
        self._block_bytes, self._fingerprint = block_bytes, fingerprint
        # A batch lies in one epoch or two.
        self._laid_out = lru_cache(maxsize=2)(self._lay_out_blocks)

    @classmethod
    def from_config(cls, config: Config, dataset: Dataset) -> SampleOrder:
        """The order of a run.

        It depends on the configuration and the data alone, not on the machine: where
        ``data.shuffle_window_samples`` is not set, the windows of all lanes take 256 MiB together.
        Blocks are smaller than ``data.block_bytes`` where the data set or a window would hold too
        few.
        """
        shards, lanes = dataset.shard_sizes, config.interleave
        window = config.data.shuffle_window_samples or fitting_window(shards, lanes)
        window_bytes = window * dataset.num_bytes // dataset.num_samples
        block_bytes = min(config.data.block_bytes, _power_of_two(window_bytes // _BLOCKS_A_WINDOW))
        block_bytes = fitting_block_bytes(shards, block_bytes, lanes)
        return cls(
            cut_blocks(shards, block_bytes),
            seed=config.run.seed,
            lanes=lanes,
            window=window,
            block_bytes=block_bytes,
            fingerprint=dataset.fingerprint,
        )

    def indices(self, positions: ArrayLike) -> Indices:
        """The sample at each position.

        Args:
            positions: int64 [k], each ≥ 0, in any order.

        Returns:
            int64 [k], indices into the data set.
        """
        epochs, q = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        rows, lanes = np.divmod(q, self.lanes)
        # The first `longer` lanes have one sample more than the others.
        length, longer = divmod(self.num_samples, self.lanes)
        # `places` count along the laid-out blocks, lane after lane.
        places = lanes * length + np.minimum(lanes, longer)
        places += self._shuffled_rows(epochs, lanes, rows, length + (lanes < longer))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._lookup(int(epoch), places[here])
        return samples

    @property
    def num_blocks(self) -> int:
        """Of all shards."""
        return len(self._sizes)

    @property
    def longest_block(self) -> int:
        """Samples in the longest block."""
        return int(self._sizes.max())

    def blocks_of(self, samples: Indices) -> tuple[Indices, Indices]:
        """First sample, and the one after the last, of the block that holds each of ``samples``."""
        return block_bounds(samples, self._ends)

    def state(self) -> dict[str, Any]:
        """What fixes the order, as JSON values. A run may only be resumed with an equal state."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "interleave": self.lanes,
            "window": self.window,
            "block_bytes": self._block_bytes,
            "fingerprint": self._fingerprint,
        }

    def _shuffled_rows(
        self, epochs: Indices, lanes: Indices, rows: Indices, lengths: Indices
    ) -> Indices:
        """Each row of each lane, shuffled in its window; a lane's last window may be shorter."""
        windows, inside = np.divmod(rows, self.window)
        first = windows * self.window
        keys = hash_words(self.seed, _WINDOWS, epochs, lanes, windows)
        return first + permute(inside, np.minimum(self.window, lengths - first), keys)

    def _lookup(self, epoch: int, places: Indices) -> Indices:
        layout, ends = self._laid_out(epoch)
        at = np.searchsorted(ends, places, side="right")
        # As far before the end of its block as laid out, so far before that in the data set.
        return self._ends[layout[at]] - (ends[at] - places)

    def _lay_out_blocks(self, epoch: int) -> tuple[NDArray[np.int32], Indices]:
        """The blocks as laid out, and the place where each ends."""
        keys = hash_words(self.seed, _BLOCKS, epoch, np.arange(len(self._sizes)))
        layout = np.argsort(keys, kind="stable").astype(np.int32)
        return layout, np.cumsum(self._sizes[layout], dtype=np.int64)


def local_positions(
    position: int, global_batch: int, rank: int, world_size: int, begin: int, end: int
) -> Indices:
    """Where in the run one worker's samples stand.

    Args:
        position: where the run begins, or goes on.
        global_batch: B, a multiple of the
        world_size: W. The worker shows ``rank + W · i`` of each batch.
        rank: 0 ≤ rank < W.
        begin: number of the first sample to tell of, counted from ``position`` on, and
        end: one past the last.

    Returns:
        int64 [end − begin].
    """
    assert global_batch % world_size == 0, f"{global_batch} samples, {world_size} workers"
    batches, places = np.divmod(np.arange(begin, end), global_batch // world_size)
    return position + batches * global_batch + rank + places * world_size


def substitute(sample: int, attempt: int, num_samples: int) -> int:
    """The sample to show instead of one that can't be read.

    It depends on nothing else, so it is the same on any number of workers.

    Args:
        sample: index of the bad one, below ``num_samples``.
        attempt: 0, 1 and so on, where the one before can't be read either.
        num_samples: N.
    """
    keys = hash_words(_SUBSTITUTES, attempt)
    return int(permute(np.array([sample]), np.array([num_samples]), keys)[0])


Shards = Sequence[tuple[int, int]]


def fitting_window(shards: Shards, lanes: int) -> int:
    """So many samples of each lane that the windows of all lanes take 256 MiB, 1 to 4,096.

    Args:
        shards: (samples, bytes) of each.
        lanes: L.
    """
    fitting = samples_within(shards, _WINDOWS_BYTES) // lanes
    return max(1, min(fitting, _LONGEST_WINDOW))


def fitting_block_bytes(shards: Shards, block_bytes: int, lanes: int) -> int:
    """``block_bytes``, halved or doubled until the number of blocks is fit.

    Halved until lanes / blocks is below 6 % or every block is one sample; doubled while there would
    be more than 2¹⁹ blocks.

    Args:
        shards: (samples, bytes) of each.
        block_bytes: wanted.
        lanes: L.
    """
    num_samples = sum(samples for samples, _ in shards)
    while block_bytes > 1:
        blocks = int(_num_blocks(shards, block_bytes).sum())
        if 100 * lanes < _LANES_PERCENT_OF_BLOCKS * blocks or blocks == num_samples:
            break
        block_bytes //= 2
    most = max(_MOST_BLOCKS, len(shards))  # no block spans two shards
    while _num_blocks(shards, block_bytes).sum() > most:
        block_bytes *= 2
    return block_bytes


def cut_blocks(shards: Shards, block_bytes: int) -> NDArray[np.int32]:
    """Cut each shard into blocks of nearly equal numbers of samples.

    On average, a block has at most ``block_bytes``. Only the manifest is needed for this, not the
    shards' indexes.

    Args:
        shards: (samples, bytes) of each; every shard has at least one sample.
        block_bytes: > 0. A block has at least one sample, however large that is.

    Returns:
        Samples in each block, int32 [b].
    """
    blocks = _num_blocks(shards, block_bytes)
    length, longer = np.divmod(np.array(shards, dtype=np.int64)[:, 0], blocks)
    # The first `longer` blocks of a shard have one sample more than its others.
    place = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    sizes = np.repeat(length, blocks) + (place < np.repeat(longer, blocks))
    return sizes.astype(np.int32)


def block_bounds(samples: Indices, ends: Indices) -> tuple[Indices, Indices]:
    """First sample, and the one after the last, of the block that holds each of ``samples``.

    Args:
        samples: int64 [k].
        ends: of all blocks, the sample after the last; ascending, [b].
    """
    blocks = np.searchsorted(ends, samples, side="right")
    begins = np.concatenate(([0], ends[:-1]))
    return begins[blocks], ends[blocks]


def samples_within(shards: Shards, num_bytes: int) -> int:
    """So many samples take at most ``num_bytes``, whichever they are; see :func:`bytes_of`."""
    samples, means = _heaviest_first(shards)
    ends = np.cumsum(samples * means)
    shard = int(np.searchsorted(ends, num_bytes, side="right"))  # the first that does not fit
    if shard == len(shards):
        return int(samples.sum())
    left = num_bytes - (ends[shard - 1] if shard else 0)
    return int(samples[:shard].sum() + left // means[shard])


def bytes_of(shards: Shards, num_samples: int) -> int:
    """Bytes that ``num_samples`` take at most, were the samples of each shard of equal size."""
    samples, means = _heaviest_first(shards)
    before = np.cumsum(samples) - samples
    return int((np.clip(num_samples - before, 0, samples) * means).sum())


def _heaviest_first(shards: Shards) -> tuple[Indices, NDArray[np.float64]]:
    """Samples of each shard and their mean bytes, in the order of these."""
    samples, num_bytes = np.array(shards, dtype=np.int64).T
    means = num_bytes / samples
    order = np.argsort(-means, kind="stable")
    return samples[order], means[order]


def _num_blocks(shards: Shards, block_bytes: int) -> Indices:
    """Of each shard."""
    samples, num_bytes = np.array(shards, dtype=np.int64).T
    return np.clip(-(-num_bytes // block_bytes), 1, samples)


def _power_of_two(number: int) -> int:
    """The largest that is not above ``number``; 1 if there is none."""
    return 1 << max(0, number.bit_length() - 1)


def permute(values: Indices, sizes: Indices, keys: _Words) -> Indices:
    """A pseudorandom permutation of {0, …, size − 1}, evaluated at single points.

    A Feistel network over two digits, ``left`` below ``width`` and ``right`` below ``height``,
    where width · height ≥ size; a result that is not below size is permuted again until it is (the
    generalized Feistel cipher with cycle-walking of Black & Rogaway 2002, "Ciphers with arbitrary
    finite domains").

    Args:
        values: int64 [k], 0 ≤ value < size.
        sizes: int64 [k], each ≥ 1.
        keys: uint64 [k]; equal key and size mean the same permutation.

    Returns:
        int64 [k], 0 ≤ result < size.
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
    """A 64-bit hash of integers, elementwise with broadcasting; uint64, at least one dimension."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        # One dimension at least: NumPy warns of overflow in scalars, and here overflow is meant.
        term = np.atleast_1d(np.asarray(word)).astype(np.uint64) + np.uint64(1)
        state = _mix(state + term * _GOLDEN)
    return state


def _mix(x: _Words) -> _Words:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
