"""The loader: batches by position, on any number of workers, from any position, and a clean end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gatdist.config import DataConfig, parse_config
from gatdist.data import (
    Batch,
    Dataset,
    Loader,
    SampleOrder,
    open_dataset,
    to_network,
    to_pixels,
    write_dataset,
)
from gatdist.data.codecs import encode_png
from gatdist.errors import DataError
from gatdist.parallel.communicator import FakeCommunicator
from gatdist.storage import Store

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 1)).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    samples = [
        (f"{i:06d}", {"png": encode_png(p), "cls": b"%d" % (i % 5)}) for i, p in enumerate(PIXELS)
    ]
    shards = [samples[:20], samples[20:]]
    store = Store(str(tmp_path))
    write_dataset(store, shards, modality="image", sample_shape=(1, 4, 3), num_classes=5)
    return open_dataset(DataConfig(url=str(tmp_path)))


@pytest.fixture
def order() -> SampleOrder:
    return SampleOrder([5] * 10, seed=1, lanes=4, window=6)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def test_batches_follow_the_order(dataset: Dataset, order: SampleOrder) -> None:
    loader = Loader(dataset, order, global_batch=8, rank=0, world_size=1, position=0)
    for step, batch in enumerate(take(loader, 20)):  # over three epochs
        positions = np.arange(8 * step, 8 * step + 8)
        indices = order.indices(positions)
        assert batch.positions.tolist() == positions.tolist()
        assert batch.samples.dtype == torch.uint8
        assert (batch.samples.numpy() == PIXELS[indices]).all()
        assert batch.labels is not None
        assert batch.labels.tolist() == (indices % 5).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_workers_share_each_global_batch(
    dataset: Dataset, order: SampleOrder, world_size: int
) -> None:
    shares = [
        take(Loader(dataset, order, global_batch=8, rank=r, world_size=world_size, position=16), 3)
        for r in range(world_size)
    ]
    for step in range(3):
        positions = torch.stack([share[step].positions for share in shares])  # [ranks, n]
        # Rank r has places r, r + W, … of the batch: by columns, the batch is in order.
        assert positions.T.flatten().tolist() == list(range(16 + 8 * step, 24 + 8 * step))


def test_a_loader_goes_on_from_any_position(dataset: Dataset, order: SampleOrder) -> None:
    whole = take(Loader(dataset, order, global_batch=8, rank=0, world_size=2, position=0), 12)
    rest = take(Loader(dataset, order, global_batch=8, rank=0, world_size=2, position=40), 7)
    for a, b in zip(whole[5:], rest, strict=True):
        assert a.positions.equal(b.positions)
        assert a.samples.equal(b.samples)


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 1), (3, 4)])
def test_settings_change_nothing_but_speed(
    dataset: Dataset, order: SampleOrder, prefetch: int, threads: int
) -> None:
    plain = Loader(dataset, order, global_batch=8, rank=0, world_size=1, position=0)
    other = Loader(
        dataset,
        order,
        global_batch=8,
        rank=0,
        world_size=1,
        position=0,
        prefetch_batches=prefetch,
        decode_threads=threads,
    )
    for a, b in zip(take(plain, 8), take(other, 8), strict=True):
        assert a.samples.equal(b.samples)


def test_for_worker_takes_the_configuration(dataset: Dataset, tmp_path: Path) -> None:
    config = parse_config(
        {
            "run": {"total_samples": 1000, "global_batch": 12, "seed": 7},
            "data": {"url": str(tmp_path), "prefetch_batches": 2},
        }
    )
    order = SampleOrder.from_config(config, dataset)
    comm = FakeCommunicator(rank=2, world_size=3)
    (batch,) = take(Loader.for_worker(dataset, order, config, comm, position=24), 1)
    assert batch.positions.tolist() == [26, 29, 32, 35]
    expected = PIXELS[order.indices(batch.positions.numpy())]
    assert (batch.samples.numpy() == expected).all()


class Counting(Dataset):
    """Counts the batches that were read, and tells each one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Store(str(folder)), DataConfig(url=str(folder)))
        self.num_reads = 0
        self.was_read = threading.Condition()

    def read(self, *args, **options):  # type: ignore[no-untyped-def]
        result = super().read(*args, **options)
        with self.was_read:
            self.num_reads += 1
            self.was_read.notify_all()
        return result


def test_reading_ahead_is_bounded(dataset: Dataset, order: SampleOrder, tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    loader = Loader(
        counting, order, global_batch=8, rank=0, world_size=1, position=0, prefetch_batches=3
    )
    with loader:
        for taken in range(4):
            with counting.was_read:
                assert counting.was_read.wait_for(lambda n=taken + 3: counting.num_reads == n, 10)
                assert not counting.was_read.wait(0.02)  # and no more than that
            next(loader)


def test_an_error_in_the_background_comes_in_its_turn(
    dataset: Dataset, order: SampleOrder, tmp_path: Path
) -> None:
    dataset.read(np.arange(20))  # the first shard is in memory; the second is lost
    (tmp_path / "shard-000001.tar").write_bytes(b"")
    first_lost = int(np.argmax(order.indices(np.arange(50)) >= 20))
    before = threading.active_count()
    with Loader(dataset, order, global_batch=1, rank=0, world_size=1, position=0) as loader:
        for _ in range(first_lost):
            next(loader)
        # Again and again, rather than passing the batch over: others after it could be read.
        assert (order.indices(np.arange(first_lost, first_lost + 5)) < 20).any()
        for _ in range(5):
            with pytest.raises(DataError, match=r"shard-000001\.tar: has 0 bytes"):
                next(loader)
    assert threading.active_count() == before


def test_closing_ends_iteration_and_threads(dataset: Dataset, order: SampleOrder) -> None:
    before = set(threading.enumerate())
    loader = Loader(
        dataset, order, global_batch=8, rank=0, world_size=1, position=0, decode_threads=3
    )
    next(loader)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(StopIteration):
        next(loader)


def test_a_loader_is_an_iterator(dataset: Dataset, order: SampleOrder) -> None:
    with Loader(dataset, order, global_batch=10, rank=0, world_size=1, position=0) as loader:
        batches: Iterator[Batch] = iter(loader)
        seen = [int(next(batches).positions[0]) for _ in range(3)]
    assert seen == [0, 10, 20]


def test_pixels_survive_the_way_to_the_network_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = to_network(pixels)
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert to_pixels(images).equal(pixels)
    assert to_pixels(images.double()).equal(pixels)


def test_to_pixels_rounds_and_clamps() -> None:
    levels = torch.tensor([-7.0, -0.51, 0.49, 0.51, 100.5, 254.6, 400.0])
    images = (levels / 127.5 - 1).double().reshape(1, 1, 1, -1)
    assert to_pixels(images).flatten().tolist() == [0, 0, 0, 1, 101, 255, 255]


def test_points_go_to_the_network_as_they_are() -> None:
    points = torch.randn(5, 2)
    assert to_network(points) is points
