"""Memory budget and reading plan: which ranges of shards a worker needs, from when until when.

The order is a pure function of the position, so a worker plans its reads ahead, a segment at a
time: some windows of all streams. Neighbouring samples of a segment form a read range, which is
fetched with one read and dropped after its last sample. A window covers neighbouring places of the
reordered blocks, so its read ranges are whole blocks except at its two ends, and no byte is needed
twice in an epoch unless workers share streams. They share none if their number divides that of the
streams.

Legend: m samples in a segment, r read ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import ConfigError
from gatdist.config import DataConfig
from gatdist.data.order import Indices, SampleOrder, ShardLayout, WorkerShare, block_bounds
from gatdist.data.reading.shards import OpenShard

# By the mean size of a shard's samples.
_MAX_RANGE_BYTES = 8 * 2**20
_MAX_GAP_BYTES = 256 * 2**10  # read rather than skipped
# Limits of a segment of the reading plan. Two must fit in memory; planning takes time, too.
_SEGMENT_BYTES, _SEGMENT_SAMPLES = 128 * 2**20, 2**17
_INDEX_SHARE = 8
# Data that is kept may be fetched in larger blocks than the order's, since requests are costly. A
# block in the host cache is read as a whole each time a part of it is needed.
_KEPT_BYTES, _CACHED_BYTES = 2 * 2**20, 2**19


@dataclass(frozen=True)
class MemoryBudget:
    """Limits on what a worker keeps in memory."""

    fetched_bytes: int  # of fetched data
    keeps: bool  # whether the whole data set stays in memory once fetched
    rows: int  # samples of each stream in a segment, a multiple of the window
    min_block_bytes: int = 0  # mean size of fetched blocks, at least


def index_bytes(config: DataConfig) -> int:
    """Return the memory limit of shard indexes."""
    return config.memory_bytes // _INDEX_SHARE


def memory_budget(
    layout: ShardLayout,
    order: SampleOrder,
    config: DataConfig,
    *,
    sample_bytes: int,
    is_cached: bool,
    share: WorkerShare,
) -> MemoryBudget:
    """Divide ``data.memory_bytes``. Raises ConfigError if it or the host cache is too small."""
    if is_cached:
        _require_cache_fits(layout, order, config)
    local_batch = share.local_batch
    batch_bytes = (config.prefetch_batches + 1) * local_batch * sample_bytes  # + 1 in use
    available = config.memory_bytes - batch_bytes - index_bytes(config)

    streams, _ = share.streams(order.interleave)
    window_samples = streams * order.window
    # The windows of a batch, and the next ones.
    at_once = 1 + -(-local_batch // window_samples)
    needed = layout.bytes_of(at_once * window_samples)
    keeps = layout.num_bytes <= available
    if not keeps and needed > available:
        # The indexes' share grows with the limit.
        least = (needed + batch_bytes) * _INDEX_SHARE // (_INDEX_SHARE - 1) + 1
        raise ConfigError(
            "data.memory_bytes",
            f"must be at least {least:,} for windows of {order.window:,} samples in {streams} "
            f"streams per worker, the next windows, and {config.prefetch_batches + 1} batches",
            value=config.memory_bytes,
            hint="Raise it, lower data.prefetch_batches, or, in a new run, "
            "data.shuffle_window_samples",
        )
    window_bytes = layout.bytes_of(window_samples)
    fitting = min(_SEGMENT_BYTES, available // 2) // max(1, window_bytes)
    windows = max(1, min(fitting, _SEGMENT_SAMPLES // window_samples))
    min_block_bytes = 0
    if keeps:
        min_block_bytes = _KEPT_BYTES
    elif is_cached and layout.num_bytes <= config.cache_bytes:
        min_block_bytes = _CACHED_BYTES
    return MemoryBudget(available, keeps, windows * order.window, min_block_bytes)


def _require_cache_fits(layout: ShardLayout, order: SampleOrder, config: DataConfig) -> None:
    # At worst all streams are on one host, and a window that ends in a block needs its rest next.
    needed = layout.bytes_of(2 * order.interleave * (order.window + order.longest_block))
    if config.cache_bytes < needed:
        raise ConfigError(
            "data.cache_bytes",
            f"must be at least {needed:,}, which the workers of a host read at the same time",
            value=config.cache_bytes,
            hint="Raise it, or remove data.cache_dir",
        )


@dataclass(slots=True, eq=False)
class ReadRange:
    """Neighbouring samples of one shard, in memory together."""

    shard: int  # its number
    first: int  # number in the shard of the first sample
    end: int  # one past the last
    num_bytes: int = 0  # an estimate, until it is fetched
    block: tuple[int, int] | None = None  # first and end of the block to fetch instead, if any
    start: int = 0  # offset of ``data`` in the shard
    data: bytes = b""  # empty before it is fetched and after it is dropped
    opened: OpenShard | None = None  # the shard, while there is data


@dataclass(frozen=True)
class Segment:
    """Consecutive samples of one worker, counted from where its plan begins."""

    begin: int  # the first sample
    end: int  # one past the last
    ranges: list[ReadRange]  # their read ranges, in order of first use
    range_of: NDArray[np.int32]  # read range of each sample, int32 [m]
    numbers: Indices  # number of each sample in its shard, int64 [m]
    new: list[ReadRange]  # the read ranges that no earlier segment has
    new_from: list[int]  # the sample that needs each of ``new`` first, ascending
    last_used: list[int]  # the last sample that needs each read range, ascending, [r]
    dropped: list[int]  # read ranges in the order of ``last_used``, [r]


class Plan:
    """The segments of one worker, of ``budget.rows`` rows each.

    With ``budget.keeps``, all read ranges are whole blocks and stay in memory. Blocks smaller than
    ``budget.min_block_bytes`` on average are replaced by larger ones for fetching. With
    ``by_block``, read ranges end at block bounds, as a shared cache requires.
    """

    def __init__(
        self,
        order: SampleOrder,
        layout: ShardLayout,
        budget: MemoryBudget,
        share: WorkerShare,
        *,
        by_block: bool,
    ) -> None:
        self._order, self._layout, self._share = order, layout, share
        self._keeps, self._by_block = budget.keeps, by_block or budget.keeps
        self._span = budget.rows * order.interleave
        _, self._shares_streams = share.streams(order.interleave)
        window_samples = order.window * order.interleave
        self._begins_in_window = share.position % order.num_samples % window_samples != 0
        self._blocks_of = order.blocks_of
        if budget.min_block_bytes:
            ends = np.cumsum(layout.cut_blocks(budget.min_block_bytes), dtype=np.int64)
            if len(ends) < order.num_blocks:
                self._blocks_of = partial(block_bounds, ends=ends)
        self._planned = 0  # samples
        self._boundary = share.position  # where the next segment begins, among all workers' samples
        self._kept: dict[int, ReadRange] = {}  # by first sample of the block

    def next(self) -> Segment:
        begin = end = self._planned
        while end == begin:
            epoch, q = divmod(self._boundary, self._order.num_samples)
            q = min(self._order.num_samples, (q // self._span + 1) * self._span)
            self._boundary = epoch * self._order.num_samples + q
            end = self._share.samples_before(self._boundary)
        self._planned = end
        return self._segment(begin, end, self._order.indices(self._share.positions(begin, end)))

    def forget(self) -> None:
        self._kept.clear()

    def _segment(self, begin: int, end: int, indices: Indices) -> Segment:
        by_index = np.argsort(indices, kind="stable")
        ordered = indices[by_index]
        shards = self._layout.shard_of(ordered)
        shard_begins = self._layout.begins[shards]
        starts = self._cut(ordered, shards, is_first=begin == 0)
        stops = np.append(starts[1:], len(ordered))
        # First and last use of each read range, and its number in order of first use.
        first_used = np.minimum.reduceat(by_index, starts)
        last_used = np.maximum.reduceat(by_index, starts)
        by_use = np.argsort(first_used)
        number = np.empty_like(by_use)
        number[by_use] = np.arange(len(by_use))
        range_of = np.empty(len(indices), dtype=np.int32)
        range_of[by_index] = np.repeat(number, stops - starts)
        numbers = np.empty_like(indices)
        numbers[by_index] = ordered - shard_begins

        ranges, is_new = self._ranges(
            shards[starts[by_use]], ordered[starts[by_use]], ordered[stops[by_use] - 1] + 1
        )
        by_end = np.argsort(last_used)
        return Segment(
            begin=begin,
            end=end,
            ranges=ranges,
            range_of=range_of,
            numbers=numbers,
            new=[each for each, new in zip(ranges, is_new, strict=True) if new],
            new_from=(begin + first_used[by_use][np.array(is_new, dtype=bool)]).tolist(),
            last_used=(begin + last_used[by_end]).tolist(),
            dropped=number[by_end].tolist(),
        )

    def _cut(self, ordered: Indices, shards: Indices, *, is_first: bool) -> Indices:
        if self._by_block:
            blocks, _ = self._blocks_of(ordered)
            return np.flatnonzero(np.diff(blocks, prepend=-1))
        # A window lacks samples that other workers read, or that precede the plan.
        has_gaps = self._shares_streams or (is_first and self._begins_in_window)
        gap_bytes = _MAX_GAP_BYTES if has_gaps else 0
        return cut_runs(ordered, shards, self._layout.mean_bytes, gap_bytes)

    def _ranges(
        self, shards: Indices, firsts: Indices, ends: Indices
    ) -> tuple[list[ReadRange], list[bool]]:
        blocks = self._blocks_of(firsts) if self._by_block else (firsts, ends)
        if self._keeps:
            firsts, ends = blocks
        begins = self._layout.begins[shards]
        columns = (
            *(shards, firsts - begins, ends - begins),
            (ends - firsts) * self._layout.mean_bytes[shards],
            *(blocks[0] - begins, blocks[1] - begins, blocks[0]),
        )
        ranges, is_new = [], []
        for shard, first, end, num_bytes, block_first, block_end, key in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            found = self._kept.get(key)
            is_new.append(found is None)
            if found is None:
                block = (block_first, block_end) if self._by_block else None
                found = ReadRange(shard, first, end, num_bytes, block)
                if self._keeps:
                    self._kept[key] = found
            ranges.append(found)
        return ranges, is_new


def cut_runs(
    ordered: Indices, shards: Indices, mean_bytes: Indices, gap_bytes: int = _MAX_GAP_BYTES
) -> Indices:
    """Return where runs of the ascending indices ``ordered``, [m], begin that are fetched at once.

    ``mean_bytes`` is the size of a sample of each shard, ``gap_bytes`` the largest gap in a run.
    """
    begins = np.ones(len(ordered), dtype=bool)
    bytes_here = mean_bytes[shards]
    gaps = np.diff(ordered) - 1
    begins[1:] = (np.diff(shards) != 0) | (gaps * bytes_here[1:] > gap_bytes)
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(ordered))
    most = np.maximum(1, _MAX_RANGE_BYTES // bytes_here)
    portions = (ordered - np.repeat(ordered[starts], lengths)) // most
    begins[1:] |= np.diff(portions) != 0
    return np.flatnonzero(begins)
