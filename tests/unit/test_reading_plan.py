"""A worker's reading plan: each sample is in a read range, kept as long as it is needed."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatdist.data.order import SampleOrder, ShardLayout, WorkerShare, block_bounds
from gatdist.data.reading import plan as planning
from gatdist.data.reading.plan import MemoryBudget, Plan, Segment, cut_runs

many = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[SampleOrder, list[tuple[int, int]], dict[str, int]]:
    """Draw an order, its shards, and the arguments of one worker's plan."""
    blocks = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1))
    shards = [(sum(sizes), sum(sizes) * draw(st.integers(100, 10**6))) for sizes in blocks]
    virtual = draw(st.sampled_from([0, 0, 4, 8]))
    world_size = draw(st.integers(1, min(5, virtual or 5)))
    interleave = draw(st.integers(1, 12))
    window = draw(st.integers(1, 20))
    sizes = [size for shard in blocks for size in shard]
    order = SampleOrder(sizes, seed=draw(st.integers(0, 99)), interleave=interleave, window=window)
    batch = virtual * draw(st.integers(1, 3)) or draw(st.integers(world_size, 36))
    given = {
        "position": batch * draw(st.integers(0, 50)),
        "global_batch": batch,
        "rank": draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
        "virtual_workers": virtual,
        "rows": window * draw(st.integers(1, 3)),
    }
    return order, shards, given


@many
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([0, 1, 10**5, 10**9]))
def test_each_sample_is_in_its_read_range_while_it_is_cached(
    case: tuple[SampleOrder, list[tuple[int, int]], dict[str, int]],
    by_block: bool,
    keeps: bool,
    least_bytes: int,
) -> None:
    order, shards, given = case
    budget = MemoryBudget(0, keeps, given["rows"], least_bytes)
    worker = WorkerShare(**{key: value for key, value in given.items() if key != "rows"})
    plan = Plan(order, ShardLayout(shards), budget, worker, by_block=by_block)
    larger = np.cumsum(ShardLayout(shards).cut_blocks(least_bytes)) if least_bytes else np.empty(0)
    bounds = order.blocks_of
    if 0 < len(larger) < order.num_blocks:
        bounds = partial(block_bounds, ends=larger)
    shard_begins = np.cumsum([0] + [samples for samples, _ in shards])
    end, known = 0, set()
    for _ in range(4):
        segment = plan.next()
        assert segment.begin == end
        end = segment.end
        assert segment.begin < end
        positions = worker.positions(segment.begin, end)
        # A segment is in one epoch, and between two multiples of its rows.
        epochs, q = np.divmod(positions, order.num_samples)
        assert len(set(epochs)) == len(set(q // (given["rows"] * order.interleave))) == 1

        ranges = [segment.ranges[k] for k in segment.range_of]
        for each, number, index in zip(
            ranges, segment.numbers, order.indices(positions), strict=True
        ):
            assert shard_begins[each.shard] + number == index
            assert each.first <= number < each.end <= shards[each.shard][0]
        used = {id(p): [] for p in segment.ranges}
        for i, each in enumerate(ranges, segment.begin):
            used[id(each)].append(i)
        assert [used[id(p)][0] for p in segment.new] == segment.new_from == sorted(segment.new_from)
        assert segment.last_used == sorted(segment.last_used)
        for last, k in zip(segment.last_used, segment.dropped, strict=True):
            assert used[id(segment.ranges[k])][-1] == last
        new = {id(each) for each in segment.new}
        assert new == {id(p) for p in segment.ranges} - (known if keeps else set())
        known |= new
        if by_block or keeps:
            for each in segment.ranges:
                first, stop = bounds(shard_begins[each.shard] + np.array([each.first]))
                assert each.block is not None
                assert each.block[0] == first[0] - shard_begins[each.shard]
                assert each.block[1] == stop[0] - shard_begins[each.shard] >= each.end
                assert not keeps or (each.first, each.end) == each.block


def segments_of_an_epoch(plan: Plan, share: int) -> list[Segment]:
    found = [plan.next()]
    while found[-1].end < share:
        found.append(plan.next())
    assert found[-1].end == share
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_no_byte_is_read_twice_in_an_epoch(world_size: int) -> None:
    # Windows and streams end inside of blocks; each sample is in one read range of one worker.
    shards = [(700, 700 * 30_000)] * 10
    order = SampleOrder([35] * 200, seed=1, interleave=64, window=24)
    fetched: Counter[tuple[int, int]] = Counter()
    reads = 0
    for rank in range(world_size):
        given = WorkerShare(0, 64, rank, world_size)
        plan = Plan(order, ShardLayout(shards), MemoryBudget(0, False, 48), given, by_block=False)
        share = len(range(rank, 7000, world_size))
        for segment in segments_of_an_epoch(plan, share):
            reads += len(segment.ranges)
            for each in segment.ranges:
                fetched.update((each.shard, i) for i in range(each.first, each.end))
    assert len(fetched) == 7000
    assert set(fetched.values()) == {1}
    # A window of 24 samples is in one or two blocks of 35.
    assert reads <= 2.0 * 7000 / 24


def test_workers_that_do_not_divide_the_streams_read_what_they_need() -> None:
    shards = [(700, 700 * 30_000)] * 10
    order = SampleOrder([35] * 200, seed=1, interleave=64, window=24)
    given = WorkerShare(0, 192, rank=1, world_size=3)
    plan = Plan(order, ShardLayout(shards), MemoryBudget(0, False, 24), given, by_block=False)
    mine = np.flatnonzero(np.arange(7000) % 192 % 3 == 1)
    num_read = sum(
        each.end - each.first
        for segment in segments_of_an_epoch(plan, len(mine))
        for each in segment.ranges
    )
    assert len(mine) <= num_read <= 7000


def test_reads_are_neither_long_nor_mostly_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_MAX_RANGE_BYTES", 1000)
    ordered = np.array([0, 1, 2, 6, 7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 20, 21, 30])
    shards = (ordered >= 18).astype(np.int64)
    starts = cut_runs(ordered, shards, np.array([100, 100]), gap_bytes=300)
    # Gaps of three samples are read; reads end after ten samples, and at the end of the shard.
    assert ordered[starts].tolist() == [0, 11, 18, 30]
    ordered = np.arange(40)
    starts = cut_runs(ordered, np.zeros(40, dtype=np.int64), np.array([100]))
    assert starts.tolist() == [0, 10, 20, 30]
    starts = cut_runs(ordered, np.zeros(40, dtype=np.int64), np.array([5000]))
    assert starts.tolist() == list(range(40))
