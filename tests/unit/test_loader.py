"""The loader: batches by position, with any number of workers, from any position; closing."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_communicator import FakeCommunicator
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import DataConfig, parse_config
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format.manifest import read_manifest
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.loader import Batch, Buffers, Loader
from gatdist.data.order import SampleOrder, WorkerShare
from gatdist.storage import Store
from support import refused

N = 200
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 16, 16, 1)).astype(np.uint8)
SHARD_SIZES = (80, 3, 60, 57)
# Cache modes: the memory that selects each, and whether a cache is shared. In tars the samples
# take 410 KB, decoded 51 KB; the windows of all streams hold 24 of them.
MODES: dict[str, dict[str, Any]] = {
    "decoded": {"memory_bytes": 2**30},
    "kept": {"memory_bytes": 2**30},
    "streamed": {"memory_bytes": 230_000},
    "cached": {"memory_bytes": 230_000, "cache_bytes": 300_000},
}


def samples(pixels: np.ndarray) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"{i:06d}", {"png": encode_png(p), "cls": b"%d" % (i % 5)}) for i, p in enumerate(pixels)
    ]


@functools.cache
def written() -> str:
    """Return the URL of the data set in memory."""
    url = f"memory://{uuid4()}"
    ends = np.cumsum(SHARD_SIZES)
    shards = [
        samples(PIXELS)[end - size : end] for size, end in zip(SHARD_SIZES, ends, strict=True)
    ]
    write_dataset(Store(url), shards, modality="image", sample_shape=(1, 16, 16), num_classes=5)
    return url


def write(folder: Path) -> str:
    folder.mkdir()
    store = Store(written())
    for name in store.list():
        (folder / name).write_bytes(store.read(name))
    return str(folder)


@pytest.fixture(params=MODES)
def dataset(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Dataset:
    return opened(request.param, tmp_path, monkeypatch)


def opened(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Dataset:
    url = written() if mode == "cached" else write(folder / "data")
    options = MODES[mode] | ({"cache_dir": str(folder)} if mode == "cached" else {}) | more
    if mode != "decoded":
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    found = open_dataset(DataConfig(url=url, **options))
    assert found.is_decoded == (mode == "decoded")
    return found


def order_of(window: int = 6, interleave: int = 4) -> SampleOrder:
    return SampleOrder(
        [8] * 10 + [3] + [6] * 10 + [7] * 8 + [1], seed=1, interleave=interleave, window=window
    )


def loader_of(dataset: Dataset, order: SampleOrder | None = None, **options: Any) -> Loader:
    given = {"global_batch": 8, "rank": 0, "world_size": 1, "position": 0} | options
    config = dataset.config.model_copy(
        update={key: given.pop(key) for key in list(given) if key in DataConfig.model_fields}
    )
    return Loader(dataset, order or order_of(), WorkerShare(**given), config=config)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def test_batches_follow_the_order(dataset: Dataset) -> None:
    order = order_of()
    for step, batch in enumerate(take(loader_of(dataset), 90)):  # over three epochs
        positions = np.arange(8 * step, 8 * step + 8)
        indices = order.indices(positions)
        assert batch.positions.tolist() == positions.tolist()
        assert batch.samples.dtype == torch.uint8
        assert (batch.samples.numpy() == PIXELS[indices]).all()
        assert batch.labels is not None
        assert batch.labels.tolist() == (indices % 5).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_workers_share_each_global_batch_equally(dataset: Dataset, world_size: int) -> None:
    given = {"global_batch": 24, "world_size": world_size, "position": 48}
    shares = [take(loader_of(dataset, rank=r, **given), 20) for r in range(world_size)]
    order = order_of()
    for step in range(20):
        positions = torch.stack([share[step].positions for share in shares])  # [ranks, n]
        # Rank r has positions r, r + W, … of the batch: by columns, the batch is in order.
        begin = 48 + 24 * step
        assert positions.T.flatten().tolist() == list(range(begin, begin + 24))
        for share in shares:
            batch = share[step]
            indices = order.indices(batch.positions.numpy())
            assert (batch.samples.numpy() == PIXELS[indices]).all()


@pytest.mark.parametrize("position", [8, 40, 184, 200, 1_000_000])
def test_loader_resumes_from_any_position(dataset: Dataset, position: int) -> None:
    for batch in take(loader_of(dataset, rank=1, world_size=2, position=position), 12):
        indices = order_of().indices(batch.positions.numpy())
        assert (batch.samples.numpy() == PIXELS[indices]).all()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        folders = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
        return {mode: opened(mode, folder, patch) for mode, folder in folders.items()}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_settings_read_the_prefix(datasets: dict[str, Dataset], data: st.DataObject) -> None:
    """The union of what all ranks read is the prefix of the order for any settings."""
    draw = data.draw
    mode = draw(st.sampled_from(list(MODES)), "mode")
    batch = 12 * draw(st.integers(1, 2), "B / 12")
    interleave = draw(st.sampled_from([n for n in range(1, 13) if batch % n == 0]), "L")
    order = order_of(draw(st.integers(1, 40 // interleave), "window"), interleave)
    config = {
        "prefetch_batches": draw(st.integers(1, 3), "prefetch"),
        "decode_threads": draw(st.integers(1, 3), "threads"),
    }
    if mode in ("streamed", "cached"):
        config |= {"memory_bytes": 300_000, "cache_bytes": 10**6}
    position = batch * draw(st.integers(0, 40), "begins at batch")
    begin, shown = position, []
    for _ in range(draw(st.integers(1, 3), "attempts")):
        world_size = draw(st.integers(1, 7), "W")
        steps = draw(st.integers(1, 8), "steps")
        for rank in range(world_size):
            given = {"global_batch": batch, "rank": rank, "world_size": world_size}
            loader = loader_of(datasets[mode], order, position=position, **given, **config)
            for step, found in enumerate(take(loader, steps)):
                indices = order.indices(found.positions.numpy())
                assert (found.samples.numpy() == PIXELS[indices]).all()
                expected = position + step * batch + np.arange(rank, batch, world_size)
                assert found.positions.tolist() == expected.tolist()
                shown += indices.tolist()
        position += steps * batch
    assert sorted(shown) == sorted(order.indices(np.arange(begin, position)).tolist())


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 1), (3, 4), (2, 2)])
def test_settings_affect_only_speed(dataset: Dataset, prefetch: int, threads: int) -> None:
    plain = take(loader_of(dataset, global_batch=32), 12)
    given = {"global_batch": 32, "prefetch_batches": prefetch, "decode_threads": threads}
    for a, b in zip(plain, take(loader_of(dataset, **given), 12), strict=True):
        assert a.samples.equal(b.samples)
        assert a.labels is not None
        assert a.labels.equal(b.labels)


def test_for_worker_uses_the_configuration(dataset: Dataset) -> None:
    config = parse_config(
        {
            "run": {"total_samples": 1000, "global_batch": 12, "seed": 7},
            "data": {"url": "unused", "prefetch_batches": 2, "shuffle_window_samples": 2},
        }
    )
    order = SampleOrder.from_config(config, dataset.layout)
    comm = FakeCommunicator(rank=2, world_size=3)
    (batch,) = take(Loader.for_worker(dataset, order, config, comm, position=24), 1)
    assert batch.positions.tolist() == [26, 29, 32, 35]
    expected = PIXELS[order.indices(batch.positions.numpy())]
    assert (batch.samples.numpy() == expected).all()


def test_caller_owns_returned_arrays(dataset: Dataset) -> None:
    loader = loader_of(dataset, prefetch_batches=1)
    order, kept = order_of(), []
    with loader:
        for _ in range(10):
            batch = next(loader)
            kept.append((batch.samples[2:4], batch.positions[2:4]))  # views of memory
            del batch
    for pixels, positions in kept:
        assert (pixels.numpy() == PIXELS[order.indices(positions.numpy())]).all()


def test_memory_of_batches_is_reused() -> None:
    made: list[np.ndarray] = []

    def make() -> np.ndarray:
        made.append(np.zeros(8, dtype=np.uint8))
        return made[-1]

    buffers = Buffers(make, most=2)
    held = [torch.from_numpy(buffers.take()) for _ in range(3)]
    view = held[0][2:5]
    del held
    for _ in range(5):
        torch.from_numpy(buffers.take()).fill_(1)
    assert len(made) == 3
    assert view.tolist() == [0, 0, 0]


class Rendezvous(Dataset):
    """Decoding threads wait for one another once."""

    barrier: threading.Barrier
    have_met = False

    def decode(self, *args):  # type: ignore[no-untyped-def]
        if not self.have_met:
            self.barrier.wait(10)
            self.have_met = True
        super().decode(*args)


def test_all_threads_decode_small_batches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatdist.data.dataset.Dataset", Rendezvous)
    dataset = opened("kept", tmp_path, monkeypatch)
    assert isinstance(dataset, Rendezvous)
    dataset.barrier = threading.Barrier(16)
    order = order_of()
    for step, batch in enumerate(take(loader_of(dataset, decode_threads=16), 8)):
        indices = order.indices(np.arange(8 * step, 8 * step + 8))
        assert (batch.samples.numpy() == PIXELS[indices]).all()


class Counting(Dataset):
    """Counts the decoded samples."""

    num_decoded = 0

    def decode(self, ranges, range_of, *rest):  # type: ignore[no-untyped-def]
        super().decode(ranges, range_of, *rest)
        self.num_decoded += len(range_of)


def test_read_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatdist.data.dataset.Dataset", Counting)
    counting = opened("streamed", tmp_path, monkeypatch)
    assert isinstance(counting, Counting)
    with loader_of(counting, prefetch_batches=3) as loader:
        for taken in range(8):
            deadline = time.monotonic() + 10
            while counting.num_decoded < 8 * (taken + 3) and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(0.02)
            assert counting.num_decoded == 8 * (taken + 3)  # and no more than that
            next(loader)


def test_background_error_is_raised_at_its_batch_on_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened("streamed", tmp_path, monkeypatch)
    (tmp_path / "data" / "shard-000002.tar").write_bytes(b"")
    indices = order_of().indices(np.arange(N))
    first_lost = int(np.argmax((indices >= 83) & (indices < 143)))
    assert first_lost > 0
    before = threading.active_count()
    with loader_of(dataset, global_batch=1) as loader:
        for _ in range(first_lost):
            next(loader)
        # Re-raised on every call; the batch must not be skipped, although later ones are readable.
        for _ in range(5):
            with refused(DataError, "shard-000002.tar"):
                next(loader)
    assert threading.active_count() == before


def test_closing_ends_iteration_and_threads(dataset: Dataset) -> None:
    before = set(threading.enumerate())
    loader = loader_of(dataset, decode_threads=3)
    next(loader)
    loader.close()
    loader.close()
    left = {thread for thread in threading.enumerate() if not thread.name.startswith("fsspec")}
    assert left <= before
    with pytest.raises(StopIteration):
        next(loader)


class Hanging(Store):
    """Storage that does not answer until it is released."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.answers = threading.Event(), threading.Event()

    def read_ranges(self, *args: Any, **options: Any) -> list[bytes]:
        self.asked.set()
        assert self.answers.wait(30)
        return super().read_ranges(*args, **options)


def test_closing_does_not_wait_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    monkeypatch.setattr("gatdist.data.loader._CLOSE_S", 0.1)
    store = Hanging(write(tmp_path / "data"))
    dataset = Dataset(store, read_manifest(store), DataConfig(url="unused"))
    loader = loader_of(dataset)
    waiting = threading.Thread(target=lambda: list(loader))
    waiting.start()
    assert store.asked.wait(10)
    began = time.monotonic()
    loader.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert time.monotonic() - began < 20  # the store answers after 30 s
    store.answers.set()  # the hanging thread ends now, or the guard against leaked threads fails


def test_insufficient_memory_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened("streamed", tmp_path, monkeypatch)
    with refused(ConfigError, "data.memory_bytes") as found:
        loader_of(dataset, memory_bytes=60_000)
    (message,) = re.findall(r"\d+,\d+", str(found.value))
    enough = int(message.replace(",", ""))
    with pytest.raises(ConfigError):
        loader_of(dataset, memory_bytes=enough - 100)
    assert len(take(loader_of(dataset, memory_bytes=enough), 30)) == 30
    # Two workers have half of the streams each.
    assert len(take(loader_of(dataset, memory_bytes=enough * 2 // 3, world_size=2), 30)) == 30


def test_insufficient_cache_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened("cached", tmp_path, monkeypatch)
    with refused(ConfigError, "data.cache_bytes"):
        loader_of(dataset, cache_bytes=9000)


def test_cache_reduces_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened("cached", tmp_path, monkeypatch, cache_bytes=2**30)
    counts = []
    with loader_of(dataset) as loader:
        for _ in range(4):
            for _ in range(N // 8):
                next(loader)
            counts.append(loader.take_counts())
    # Whole blocks are fetched, so no byte is fetched twice, although windows end inside of them.
    assert sum(c["data/bytes_fetched"] for c in counts) <= dataset.num_bytes
    assert counts[-1]["data/bytes_fetched"] == 0
    assert counts[-1]["data/cache_hits"] > 5
    assert 0 <= counts[-1]["data/ready_batches"] <= 4


def test_cached_data_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened("kept", tmp_path, monkeypatch)
    take(loader_of(dataset), 4 * N // 8)
    assert 0.7 * dataset.num_bytes <= dataset.bytes_fetched <= dataset.num_bytes


def test_loader_is_an_iterator(dataset: Dataset) -> None:
    with loader_of(dataset, global_batch=10) as loader:
        batches: Iterator[Batch] = iter(loader)
        seen = [int(next(batches).positions[0]) for _ in range(3)]
    assert seen == [0, 10, 20]


@pytest.mark.parametrize("num_samples", [1, 2])
def test_one_shard_and_eight_ranks(
    num_samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(
        Store(str(tmp_path)),
        [samples(PIXELS[:num_samples])],
        modality="image",
        sample_shape=(1, 16, 16),
        num_classes=5,
    )
    order = SampleOrder([1] * num_samples, seed=0, interleave=8, window=4)
    for decoded_bytes in (0, 2**20):
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", decoded_bytes)
        dataset = open_dataset(DataConfig(url=str(tmp_path)))
        for rank in range(8):
            given = {"global_batch": 16, "rank": rank, "world_size": 8}
            for batch in take(loader_of(dataset, order, **given), 3):
                indices = order.indices(batch.positions.numpy())
                assert (batch.samples.numpy() == PIXELS[indices]).all()
