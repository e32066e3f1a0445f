"""The order of samples: a permutation per epoch, for any reader and any split."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatdist.data.order import (
    SampleOrder,
    ShardLayout,
    WorkerShare,
    fitting_block_bytes,
    fitting_window,
    hash_words,
    permute,
    substitute,
)

block_lists = st.lists(st.integers(1, 9), min_size=1, max_size=30)
seeds = st.integers(0, 2**63 - 1)
many = settings(max_examples=60, deadline=None)


@many
@given(block_lists, seeds, st.integers(1, 100), st.integers(1, 50), st.integers(0, 2**40))
def test_every_epoch_shows_every_sample_once(
    blocks: list[int], seed: int, interleave: int, window: int, epoch: int
) -> None:
    order = SampleOrder(blocks, seed=seed, interleave=interleave, window=window)
    n = order.num_samples
    found = order.indices(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(found.tolist()) == list(range(n))


@many
@given(block_lists, seeds, st.integers(1, 20), st.randoms(use_true_random=False))
def test_each_position_has_its_sample_however_it_is_requested(
    blocks: list[int], seed: int, interleave: int, random: object
) -> None:
    order = SampleOrder(blocks, seed=seed, interleave=interleave, window=7)
    positions = np.arange(3 * order.num_samples)
    together = order.indices(positions)
    random.shuffle(positions)  # type: ignore[attr-defined]
    assert (order.indices(positions) == together[positions]).all()
    one_by_one = [int(order.indices([position])[0]) for position in positions[:20]]
    assert one_by_one == together[positions[:20]].tolist()


@many
@given(st.data(), block_lists, seeds)
def test_all_ranks_together_show_the_prefix_whenever_their_number_changes(
    data: st.DataObject, blocks: list[int], seed: int
) -> None:
    virtual = data.draw(st.sampled_from([0, 0, 1, 4, 8]), label="virtual workers")
    batch = (virtual or 1) * data.draw(st.integers(1, 36 // (virtual or 1)), label="B")
    world_sizes = st.integers(1, virtual or batch)
    batches = data.draw(st.integers(1, 3), label="batches per step")
    interleave = data.draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]), "L")
    window = data.draw(st.integers(1, 20), label="window")
    attempts = data.draw(  # each continues where the one before was interrupted
        st.lists(st.tuples(world_sizes, st.integers(1, 4)), min_size=1, max_size=4),
        label="(W, steps) of each attempt",
    )
    shown: list[int] = []
    position = 0
    for world_size, steps in attempts:
        order = SampleOrder(
            blocks, seed=seed, interleave=interleave, window=window
        )  # as resumed elsewhere
        for rank in range(world_size):
            share = WorkerShare(position, batch, rank, world_size, batches, virtual)
            positions = share.positions(0, steps * share.local_batch)
            shown += order.indices(positions).tolist()
            assert (np.diff(positions) > 0).all()
            assert share.samples_before(position + steps * batches * batch) == len(positions)
            for i in range(0, len(positions), 5):
                assert share.samples_before(int(positions[i])) == i
        position += steps * batches * batch
    n = order.num_samples
    prefix = order.indices(np.arange(position)).tolist()
    assert sorted(shown) == sorted(prefix)
    counts = np.bincount(prefix, minlength=n)
    assert counts.min() >= position // n  # nothing lost in a whole epoch
    assert counts.max() <= -(-position // n)  # and nothing twice


def test_rank_is_the_position_in_the_batch_modulo_the_ranks() -> None:
    share = WorkerShare(240, global_batch=12, rank=1, world_size=3)
    positions = share.positions(0, 400)
    assert positions[:6].tolist() == [241, 244, 247, 250, 253, 256]
    assert ((positions % 12) % 3 == 1).all()
    assert (share.positions(130, 150) == positions[130:150]).all()


def test_canonical_shares_are_whole_virtual_workers_in_the_order_of_the_tree() -> None:
    shares = [WorkerShare(0, 16, rank, 3, virtual_workers=8) for rank in range(3)]
    # Leaves 0 to 2, 3 to 5, and 6 and 7 of the order 0 4 2 6 1 5 3 7.
    assert [share.places.tolist() for share in shares] == [
        [0, 2, 4, 8, 10, 12],
        [1, 5, 6, 9, 13, 14],
        [3, 7, 11, 15],
    ]


@pytest.mark.parametrize(
    ("batch", "interleave", "world_size", "virtual", "streams", "are_shared"),
    [
        (64, 64, 4, 0, 16, False),
        (64, 64, 5, 0, 13, False),
        (128, 64, 5, 0, 26, True),
        (12, 4, 3, 0, 4, True),
        (32, 16, 3, 8, 6, False),
        (32, 2, 3, 8, 1, True),
        (10, 4, 2, 0, 2, False),
    ],
)
def test_streams_of_a_worker_and_whether_others_read_them(
    batch: int, interleave: int, world_size: int, virtual: int, streams: int, are_shared: bool
) -> None:
    share = WorkerShare(0, batch, 0, world_size, virtual_workers=virtual)
    assert share.streams(interleave) == (streams, are_shared)


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder([4] * 50, seed=0, interleave=8, window=16)
    other = SampleOrder([4] * 50, seed=1, interleave=8, window=16)
    first, second = order.indices(np.arange(200)), order.indices(np.arange(200, 400))
    assert np.mean(first == second) < 0.05
    assert np.mean(first == other.indices(np.arange(200))) < 0.05


def test_few_blocks_are_in_use_at_a_time() -> None:
    # 64 streams over blocks of 16 samples, windows of 32: each stream has two or three blocks open.
    blocks, interleave = 1280, 64
    order = SampleOrder([16] * blocks, seed=5, interleave=interleave, window=32)
    block_of = order.indices(np.arange(order.num_samples)) // 16  # [positions]
    by_stream = block_of.reshape(-1, interleave).T  # [streams, rows]
    for stream in by_stream:
        for window in stream.reshape(-1, 32):
            assert len(set(window.tolist())) <= 3
    # A memory of three blocks per stream loads nearly every block only once.
    loads = sum(
        len(set(stream[i : i + 32].tolist()) - set(stream[max(0, i - 32) : i].tolist()))
        for stream in by_stream
        for i in range(0, len(stream), 32)
    )
    assert loads <= 1.06 * blocks


@pytest.mark.parametrize(
    ("world_size", "least", "most"),
    [(1, 1.0, 1.0), (2, 1.0, 1.16), (8, 1.0, 1.16), (64, 1.0, 1.16), (3, 2.5, 3.0), (48, 3.0, 3.5)],
)
def test_block_is_read_by_few_ranks(world_size: int, least: float, most: float) -> None:
    # 64 streams over 400 blocks. If W divides L, only blocks in which a stream ends are shared.
    batch = 64 * world_size // math.gcd(64, world_size)
    order = SampleOrder([60] * 400, seed=3, interleave=64, window=240)
    positions = np.arange(order.num_samples)
    blocks = order.indices(positions) // 60
    ranks = positions % batch % world_size
    reads = len(np.unique(blocks * world_size + ranks))
    assert least <= reads / 400 <= most


def test_batch_mixes_distant_samples() -> None:
    order = SampleOrder([16] * 1280, seed=5, interleave=64, window=32)
    batch = order.indices(np.arange(64))
    assert len(set((batch // 16).tolist())) >= 60
    # Neighbours in time are not neighbours in the data set.
    shown = order.indices(np.arange(4096))
    assert np.mean(np.abs(np.diff(shown)) < 16) < 0.02


@many
@given(st.integers(1, 300), seeds)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    sizes = np.full(size, size)
    found = permute(np.arange(size), sizes, np.full(size, key, dtype=np.uint64))
    assert sorted(found.tolist()) == list(range(size))


def test_permute_accepts_many_sizes_and_keys_at_once() -> None:
    sizes = np.array([1, 2, 7, 4096, 10**12])
    values = sizes - 1
    keys = hash_words(np.arange(5))
    together = permute(values, sizes, keys)
    alone = [
        int(permute(values[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0]) for i in range(5)
    ]
    assert together.tolist() == alone


def test_permutations_are_uniform() -> None:
    # Over 20,000 keys, each of 10 values should go to each of 10 places 2,000 times; a deviation
    # of 6 standard deviations (42 each) has a probability of 1e-9 per cell.
    keys = hash_words(np.arange(20_000))
    sizes = np.full(20_000, 10)
    for value in range(10):
        found = permute(np.full(20_000, value), sizes, keys)
        assert np.abs(np.bincount(found, minlength=10) - 2000).max() < 6 * 42.4


@many
@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 10**7)), min_size=1, max_size=5),
    st.integers(1, 10**7),
    st.integers(1, 64),
)
def test_blocks_contain_all_samples_and_are_small_enough(
    shards: list[tuple[int, int]], requested: int, interleave: int
) -> None:
    block_bytes = fitting_block_bytes(ShardLayout(shards), requested, interleave)
    blocks = ShardLayout(shards).cut_blocks(block_bytes)
    num_samples = sum(samples for samples, _ in shards)
    assert blocks.min() >= 1
    assert blocks.sum() == num_samples
    # No block spans two shards.
    assert set(np.cumsum([samples for samples, _ in shards])) <= set(np.cumsum(blocks).tolist())
    assert 1 <= block_bytes <= requested
    assert interleave / len(blocks) < 0.06 or len(blocks) == num_samples or block_bytes == 1


shard_lists = st.lists(
    st.tuples(st.integers(1, 500), st.integers(1, 10**7)), min_size=1, max_size=5
)


@many
@given(shard_lists, st.integers(0, 3 * 10**7))
def test_bytes_and_samples_are_inverse_functions(
    shards: list[tuple[int, int]], num_bytes: int
) -> None:
    total = sum(samples for samples, _ in shards)
    fitting = ShardLayout(shards).samples_within(num_bytes)
    assert 0 <= fitting <= total
    assert ShardLayout(shards).bytes_of(fitting) <= num_bytes
    # No other samples of this number take more bytes.
    assert fitting == total or ShardLayout(shards).bytes_of(fitting + 1) > num_bytes - 1
    assert ShardLayout(shards).bytes_of(total) == pytest.approx(
        sum(size for _, size in shards), abs=1
    )


def test_windows_take_a_fixed_amount_of_memory() -> None:
    # Images of 30 KB: 139 of them in each of 64 streams take 256 MiB. Small samples: 4,096.
    assert fitting_window(ShardLayout([(10_000, 10_000 * 30_000)] * 50), 64) == 139
    assert fitting_window(ShardLayout([(10_000, 10_000 * 1_000)] * 50), 64) == 4096
    assert fitting_window(ShardLayout([(10, 10 * 2**30)]), 64) == 1
    # A few heavy shards count as much as their samples take.
    assert fitting_window(ShardLayout([(10_000, 10_000 * 30_000)] * 50 + [(1, 2**27)]), 64) == 69


def test_huge_data_set_has_a_bounded_number_of_blocks() -> None:
    shards = [(10_000, 10_000 * 500_000)] * 10_000  # 50 TB
    block_bytes = fitting_block_bytes(ShardLayout(shards), 2**20, 64)
    blocks = ShardLayout(shards).cut_blocks(block_bytes)
    assert 2**18 <= len(blocks) <= 2**19
    assert blocks.sum(dtype=np.int64) == 10**8


def test_blocks_of_samples_contain_them() -> None:
    order = SampleOrder([3, 1, 4], seed=0, interleave=2, window=2)
    first, end = order.blocks_of(np.arange(8))
    assert first.tolist() == [0, 0, 0, 3, 4, 4, 4, 4]
    assert end.tolist() == [3, 3, 3, 4, 8, 8, 8, 8]


def test_no_two_samples_have_the_same_substitute() -> None:
    for attempt in range(4):
        found = [substitute(i, attempt, 210) for i in range(210)]
        assert sorted(found) == list(range(210))
        assert np.mean(found == np.arange(210)) < 0.05
    assert len({substitute(5, attempt, 210) for attempt in range(8)}) > 4
    assert substitute(0, 0, 1) == 0


def test_state_is_small_and_has_all_that_fixes_the_order() -> None:
    order = SampleOrder(
        [2] * 9, seed=4, interleave=3, window=5, block_bytes=1024, fingerprint="f" * 64
    )
    before = order.state()
    order.indices(np.arange(1000))
    assert (
        order.state()
        == before
        == {
            "order_version": 1,
            "seed": 4,
            "interleave": 3,
            "window": 5,
            "block_bytes": 1024,
            "fingerprint": "f" * 64,
        }
    )


def test_order_of_version_1_never_changes() -> None:
    # Golden values. Saved runs depend on them: a change requires a new ORDER_VERSION.
    assert hash_words([0, 1, 2**63 - 1], 7).tolist() == [
        4890566965504419038,
        4694278504405454232,
        9483795012377406068,
    ]
    small = SampleOrder([3, 1, 4, 1, 5], seed=9, interleave=3, window=4)
    assert small.indices(np.arange(28)).tolist() == [
        *(1, 4, 11, 0, 5, 12, 3, 6, 10, 2, 7, 13, 8, 9),
        *(8, 12, 6, 2, 10, 7, 1, 11, 4, 0, 13, 5, 9, 3),
    ]
    large = SampleOrder([100, 80] * 300, seed=2**62 + 1, interleave=64, window=256)
    digest = hashlib.sha256(large.indices(np.arange(10**9, 10**9 + 54_000)).astype("<i8").tobytes())
    assert digest.hexdigest() == "a5b5e7a7850eaef13400db2b310b421f2e87bdfa16c7542e7420cbaaf5865014"
