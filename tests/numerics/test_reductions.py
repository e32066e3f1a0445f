"""Means over simulated workers with shares of different sizes."""

import pytest
import torch

from fake_communicator import on_workers
from gatdist.data.order import WorkerShare
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import CanonicalReduction, FastReduction
from gatdist.parallel.tree import bit_reversed, leaves_of, subtrees

BATCH, SIZES = 48, (5, 1, 33)


def mean_over_workers(comm, virtual_workers, micro_batch=None, last=BATCH):
    """Return the mean of the last samples over all workers, computed in several tensors."""
    share = WorkerShare(0, BATCH, comm.rank, comm.world_size, virtual_workers=virtual_workers)
    mine = torch.from_numpy(share.places)
    batch = Batch(samples()[mine], None, mine, 0, BATCH).last(last)
    reduction = FastReduction(comm)
    if virtual_workers:
        reduction = CanonicalReduction(comm, virtual_workers)
    parts = reduction.split(batch, micro_batch)
    assert all(len(part) <= (micro_batch or BATCH) for part in parts)
    means = (list((part.real.mean(0) * part.weight).split(SIZES)) for part in parts)
    return torch.cat(reduction.mean(means))


def samples():
    """Return samples of all magnitudes, whose sum depends on its order."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-3, 3, BATCH)[torch.randperm(BATCH, generator=generator)]
    return torch.randn(BATCH, sum(SIZES), generator=generator) * scales[:, None]


@pytest.mark.parametrize("virtual_workers", [1, 2, 4, 8, 16])
def test_canonical_means_have_the_bits_of_one_worker_on_any_number(virtual_workers):
    (alone,) = on_workers(1, mean_over_workers, virtual_workers)
    torch.testing.assert_close(alone, samples().mean(0))
    for world_size in range(2, virtual_workers + 1):
        for found in on_workers(world_size, mean_over_workers, virtual_workers):
            assert torch.equal(found, alone), world_size


def test_sum_in_another_order_has_other_bits():
    (eight,), (sixteen,) = (on_workers(1, mean_over_workers, n) for n in (8, 16))
    assert not torch.equal(eight, sixteen)


@pytest.mark.parametrize("micro_batch", [None, 1, 5])
@pytest.mark.parametrize("last", [BATCH, 7])
def test_fast_means_weight_each_sample_equally_on_any_number_of_workers(micro_batch, last):
    expected = samples()[-last:].mean(0)
    for world_size in range(1, min(last, 12) + 1):
        for found in on_workers(world_size, mean_over_workers, 0, micro_batch, last):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64])
def test_leaves_are_divided_into_neighbouring_ranges_of_few_complete_subtrees(count):
    assert sorted(bit_reversed(count)) == list(range(count))
    for world_size in range(1, count + 1):
        ranges = [leaves_of(rank, world_size, count) for rank in range(world_size)]
        assert [leaf for leaves in ranges for leaf in leaves] == list(range(count))
        lengths = [len(leaves) for leaves in ranges]
        assert lengths[0] == max(lengths) <= min(lengths) + 1
        cut = [subtrees(leaves) for leaves in ranges]
        for leaves, trees in zip(ranges, cut, strict=True):
            assert [leaf for tree in trees for leaf in tree] == list(leaves)
            assert all(tree.start % len(tree) == 0 for tree in trees)
            assert all(len(tree).bit_count() == 1 for tree in trees)
            assert len(trees) <= max(1, 2 * (count.bit_length() - 1))
        if world_size.bit_count() == 1:
            assert [len(trees) for trees in cut] == [1] * world_size


@pytest.mark.parametrize(("world_size", "vectors"), [(2, 1), (4, 1), (8, 1), (3, 2), (7, 1)])
def test_powers_of_two_send_one_vector_per_worker(world_size, vectors):
    def sent(comm):
        received = comm.all_to_all
        numbers = []

        def counted(rows):
            numbers.append(rows.numel())
            return received(rows)

        comm.all_to_all = counted
        mean_over_workers(comm, 8)
        return numbers

    length = -(-sum(SIZES) // world_size)
    for found in on_workers(world_size, sent):
        assert found == [vectors * world_size * length]
