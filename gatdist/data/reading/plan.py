"""Which pieces of which shards the coming samples of a worker need, and from when until when.

The order is a pure function of the position, so what a worker will read is known. Its samples are
planned in stretches: some windows of all lanes at a time. Samples of a stretch that are neighbours
in a shard make one piece, fetched with one read and dropped after its last sample. A window covers
neighbouring places of the laid-out blocks, so its pieces are whole blocks but for its two ends, and
no byte is needed twice in an epoch where the number of workers divides that of the lanes.

Legend: m samples in a stretch, p pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.order import Indices, SampleOrder, block_bounds, cut_blocks, local_positions

# The longest read, and the gap that is rather read than left out. Both by the shard's mean.
_LONGEST_BYTES = 8 * 2**20
_GAP_BYTES = 256 * 2**10


class Piece:
    """Neighbouring samples of one shard, in memory together.

    Attributes:
        shard: its number.
        first: number in the shard of the first sample, and
        end: one past the last.
        block: likewise first and end of the block that is fetched for it; None fetches the piece.
        num_bytes: an estimate, until it is fetched.
        start: the byte of the shard where ``data`` begins.
        data: the bytes; b"" before they are fetched and after they are dropped.
        rows: decodes its samples.
    """

    __slots__ = ("block", "data", "end", "first", "num_bytes", "rows", "shard", "start")

    def __init__(
        self, shard: int, first: int, end: int, num_bytes: int, block: tuple[int, int] | None
    ) -> None:
        self.shard, self.first, self.end = shard, first, end
        self.block, self.num_bytes = block, num_bytes
        self.start, self.data = 0, b""
        self.rows: Any = None


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples of one worker, counted from where its plan begins.

    Attributes:
        begin: the first sample, and
        end: one past the last.
        pieces: what they need, in the order of first need.
        piece_of: each sample's piece, int32 [m].
        numbers: each sample's number in its shard, int64 [m].
        new: those of the pieces that no stretch before has, and
        new_from: the sample that needs each first, ascending.
        last_used: ascending, the last sample that needs a piece, int64 [p], and
        dropped: which piece that is, [p].
    """

    begin: int
    end: int
    pieces: list[Piece]
    piece_of: NDArray[np.int32]
    numbers: Indices
    new: list[Piece]
    new_from: list[int]
    last_used: list[int]
    dropped: list[int]


class Plan:
    """The stretches of one worker, one after the other.

    Args:
        order: of the samples.
        shards: (samples, bytes) of each.
        position: samples shown globally so far.
        global_batch: B samples of all workers a step.
        rank: of the worker.
        world_size: W workers.
        rows: of the lanes in a stretch: a multiple of the window.
        by_block: whether pieces end where blocks do. A shared cache needs that: blocks are the same
            in each epoch.
        keeps: whether all pieces stay in memory. They are whole blocks then.
        least_bytes: blocks of the order that are smaller on average are not fetched one by one, but
            as larger ones that are cut for this alone. 0 leaves them.
    """

    def __init__(
        self,
        order: SampleOrder,
        shards: Sequence[tuple[int, int]],
        *,
        position: int,
        global_batch: int,
        rank: int,
        world_size: int,
        rows: int,
        by_block: bool,
        keeps: bool,
        least_bytes: int = 0,
    ) -> None:
        samples, num_bytes = np.array(shards, dtype=np.int64).T
        self._order, self._keeps, self._by_block = order, keeps, by_block or keeps
        self._shard_ends, self._shard_sizes = np.cumsum(samples), samples
        self._mean_bytes = np.maximum(1, num_bytes // samples)
        self._position, self._global_batch = position, global_batch
        self._rank, self._world_size = rank, world_size
        self._span = rows * order.lanes
        self._shares_lanes = order.lanes % world_size != 0
        shuffle_window_samples = order.window * order.lanes
        self._begins_in_window = position % order.num_samples % shuffle_window_samples != 0
        self._blocks_of = order.blocks_of
        if least_bytes:
            ends = np.cumsum(cut_blocks(shards, least_bytes), dtype=np.int64)
            if len(ends) < order.num_blocks:
                self._blocks_of = partial(block_bounds, ends=ends)
        self._planned = 0  # samples
        self._boundary = position  # where the next stretch begins, among all workers' samples
        self._kept: dict[int, Piece] = {}  # by first sample of the block

    def positions(self, begin: int, end: int) -> Indices:
        """The positions in the run of the worker's samples ``begin`` to ``end``, int64."""
        return local_positions(
            self._position, self._global_batch, self._rank, self._world_size, begin, end
        )

    def next(self) -> Stretch:
        """The stretch that follows the one before."""
        begin = end = self._planned
        while end == begin:
            epoch, q = divmod(self._boundary, self._order.num_samples)
            q = min(self._order.num_samples, (q // self._span + 1) * self._span)
            self._boundary = epoch * self._order.num_samples + q
            end = self._samples_before(self._boundary)
        self._planned = end
        return self._stretch(begin, end, self._order.indices(self.positions(begin, end)))

    def forget(self) -> None:
        """Let go of the pieces that are kept."""
        self._kept.clear()

    def _samples_before(self, position: int) -> int:
        """How many of the worker's samples come before that position."""
        batches, places = divmod(position - self._position, self._global_batch)
        mine = -(-(places - self._rank) // self._world_size)
        local_batch = self._global_batch // self._world_size
        return batches * local_batch + min(max(0, mine), local_batch)

    def _stretch(self, begin: int, end: int, indices: Indices) -> Stretch:
        by_index = np.argsort(indices, kind="stable")
        ordered = indices[by_index]
        shards = np.searchsorted(self._shard_ends, ordered, side="right")
        shard_begins = self._shard_ends[shards] - self._shard_sizes[shards]
        # A window lacks samples that other workers read, or that were read before this plan began.
        has_gaps = self._shares_lanes or (begin == 0 and self._begins_in_window)
        starts = self._cut(ordered, shards, _GAP_BYTES if has_gaps else 0)
        stops = np.append(starts[1:], len(ordered))
        # When each piece is needed first and last, and its number in the order of first need.
        first_used = np.minimum.reduceat(by_index, starts)
        last_used = np.maximum.reduceat(by_index, starts)
        by_need = np.argsort(first_used)
        number = np.empty_like(by_need)
        number[by_need] = np.arange(len(by_need))
        piece_of = np.empty(len(indices), dtype=np.int32)
        piece_of[by_index] = np.repeat(number, stops - starts)
        numbers = np.empty_like(indices)
        numbers[by_index] = ordered - shard_begins

        pieces, is_new = self._pieces(
            shards[starts], ordered[starts], ordered[stops - 1] + 1, shard_begins[starts], by_need
        )
        by_end = np.argsort(last_used)
        return Stretch(
            begin=begin,
            end=end,
            pieces=pieces,
            piece_of=piece_of,
            numbers=numbers,
            new=[piece for piece, new in zip(pieces, is_new, strict=True) if new],
            new_from=(begin + first_used[by_need][np.array(is_new, dtype=bool)]).tolist(),
            last_used=(begin + last_used[by_end]).tolist(),
            dropped=number[by_end].tolist(),
        )

    def _cut(self, ordered: Indices, shards: Indices, gap_bytes: int) -> Indices:
        """Where, in the sorted samples of a stretch, its pieces begin."""
        if self._by_block:
            blocks, _ = self._blocks_of(ordered)
            return np.flatnonzero(np.diff(blocks, prepend=-1))
        return cut_runs(ordered, shards, self._mean_bytes, gap_bytes)

    def _pieces(
        self, shards: Indices, firsts: Indices, ends: Indices, begins: Indices, by_need: Indices
    ) -> tuple[list[Piece], list[bool]]:
        """In the order of need, each piece, and whether it is new.

        Args:
            shards: of each piece, its shard,
            firsts: index of its first sample and
            ends: one past its last,
            begins: index of the shard's first sample. All [p].
            by_need: pieces in the order of first need, [p].
        """
        if self._by_block:
            block_firsts, block_ends = self._blocks_of(firsts)
        else:
            block_firsts, block_ends = firsts, ends
        if self._keeps:
            firsts, ends = block_firsts, block_ends
        columns = (
            firsts - begins,
            ends - begins,
            block_firsts - begins,
            block_ends - begins,
            shards,
            (ends - firsts) * self._mean_bytes[shards],
            block_firsts,
        )
        pieces, is_new = [], []
        for first, end, block_first, block_end, shard, num_bytes, key in zip(
            *(column[by_need].tolist() for column in columns), strict=True
        ):
            piece = self._kept.get(key)
            is_new.append(piece is None)
            if piece is None:
                block = (block_first, block_end) if self._by_block else None
                piece = Piece(shard, first, end, num_bytes, block)
                if self._keeps:
                    self._kept[key] = piece
            pieces.append(piece)
        return pieces, is_new


def cut_runs(
    ordered: Indices, shards: Indices, mean_bytes: Indices, gap_bytes: int = _GAP_BYTES
) -> Indices:
    """Where, among samples sorted by index, those begin that are fetched with one read.

    Args:
        ordered: indices in the data set, ascending, [m].
        shards: number of the shard of each, [m].
        mean_bytes: of a sample of each shard.
        gap_bytes: samples between two wanted ones are read too, if they take no more than this.

    Returns:
        Numbers 0 ≤ i < m, ascending.
    """
    begins = np.ones(len(ordered), dtype=bool)
    bytes_here = mean_bytes[shards]
    gaps = np.diff(ordered) - 1
    begins[1:] = (np.diff(shards) != 0) | (gaps * bytes_here[1:] > gap_bytes)
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(ordered))
    most = np.maximum(1, _LONGEST_BYTES // bytes_here)
    portions = (ordered - np.repeat(ordered[starts], lengths)) // most
    begins[1:] |= np.diff(portions) != 0
    return np.flatnonzero(begins)
