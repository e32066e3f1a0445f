"""S3: a data set, and a run that is stopped and resumed, on a real server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import Server

from benchmarks.proxy import Fault, Proxy
from changing_workers import SMALL_FILES, Workers, digest
from gatdist.common.errors import DataError, UserError
from gatdist.config import DataConfig, load_config
from gatdist.data.builtin import write_digits
from gatdist.data.dataset import open_dataset
from gatdist.data.loader import Loader
from gatdist.data.order import SampleOrder, WorkerShare
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, read_lines
from gatdist.runs.checkpoints import Retention
from gatdist.storage import Store
from gatdist.training.loop import run
from support import refused, wait_until

pytestmark = pytest.mark.storage

SHORT = [
    "run.total_samples=640",
    "run.log_every_samples=128",
    "run.checkpoint_every_samples=128",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "evaluate.metrics=[]",
]


@pytest.fixture
def options(moto: Server) -> dict[str, Any]:
    return moto.options(moto.address)


@pytest.fixture
def store(moto: Server, options: dict[str, Any]) -> Store:
    return Store(f"{moto.new_bucket()}/runs/a", options)


def test_options_are_read_from_the_environment(
    store: Store, moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("x", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.address)
    assert Store(store.url).read("x") == b"1"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("GATDIST_TEST_ENDPOINT", moto.address)
    referring = {"client_kwargs": {"endpoint_url": "${env:GATDIST_TEST_ENDPOINT}"}}
    assert Store(store.url, referring).read("x") == b"1"


def test_data_set_on_s3(store: Store, options: dict[str, Any]) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options)
    here, there = open_dataset(DataConfig(url="builtin:digits")), open_dataset(config)
    assert there.fingerprint == here.fingerprint
    order = SampleOrder.from_config(load_config("digits"), there.layout)
    share = WorkerShare(640, 64, rank=0, world_size=2)
    with Loader(there, order, share, config=there.config) as loader:
        for _ in range(3):
            batch = next(loader)
            samples, labels = here.read(order.indices(batch.positions.numpy()))
            assert (batch.samples.numpy() == samples).all()
            assert batch.labels is not None
            assert (batch.labels.numpy() == labels).all()


def test_lost_or_replaced_shard(store: Store, options: dict[str, Any]) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options)
    store.publish("shard-000003.tar", b"something else")
    with refused(DataError, "shard-000003.tar"):
        open_dataset(config).read(np.array([1796]))
    store.delete("manifest.json")
    with refused(DataError, "a"):
        open_dataset(config)


def test_bucket_deleted_during_reads(moto: Server, options: dict[str, Any]) -> None:
    bucket = moto.new_bucket()
    store = Store(bucket, options)
    write_digits(store)
    config = DataConfig(
        url=bucket, storage_options=options, memory_bytes=400_000, prefetch_batches=1
    )
    dataset = open_dataset(config)
    order = SampleOrder(dataset.layout.cut_blocks(8192), seed=0, interleave=8, window=4)
    share = WorkerShare(0, 64, rank=0, world_size=1)
    with Loader(dataset, order, share, config=config) as loader:
        next(loader)
        for name in store.list():
            store.delete(name)
        with refused(UserError) as raised:  # of either shard's index
            deque(islice(loader, 1000), maxlen=0)
        with pytest.raises(UserError):  # and again, rather than skipping it
            next(loader)
    assert raised.value.subject.endswith(".index.npy")
    assert raised.value.exit_status == 2


# An expired token, reported once, with S3's own message.
EXPIRED = Fault(
    "refuse",
    path="*/manifest.json",
    status=400,
    body="<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>Old.</Message></Error>",
)
# Faults: of the ranges of shards, more than half fail the first time, each in the first of these
# ways whose rate it is below.
BAD_DAY = [
    EXPIRED,
    Fault("refuse", path="*.tar", rate=0.15, headers={"Retry-After": "0"}),
    Fault("reset", path="*.tar", rate=0.3),
    Fault("short", path="*.tar", rate=0.45),
    Fault("flip_bit", path="*.tar", rate=0.6),
    Fault("reset", path="*.npy"),
]


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_run_with_storage_faults_equals_one_on_disk(
    moto: Server, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latency, 503s, resets, an expired token and flipped bits do not change the result."""
    monkeypatch.setattr("gatdist.data.reading.plan._CACHED_BYTES", 0)  # for more requests
    with Proxy(moto.address, latency_s=0.005, faults=BAD_DAY) as proxy:
        bucket = moto.new_bucket()
        write_digits(Store(f"{bucket}/digits", moto.options(moto.address)))
        read = [
            "run.total_samples=320",
            f"data.url={bucket}/digits",
            "data.memory_bytes=400000",  # too little to cache the decoded data set
            "data.prefetch_batches=1",
            "data.shuffle_window_samples=4",
            "data.interleave=8",
            "data.block_bytes=8192",
        ]
        comm = LocalCommunicator(torch.device("cpu"))
        digests = []
        for place in ("disk", "bad day"):
            config = load_config("digits", [*SHORT, *read, "data.storage_options={}"])
            data = {"storage_options": moto.options(proxy.url)}
            if place == "disk":
                write_digits(Store(str(tmp_path / "digits")))
                data = {"url": str(tmp_path / "digits")}
            elif cached:
                data["cache_dir"] = str(tmp_path / "cache")
            config = config.model_copy(update={"data": config.data.model_copy(update=data)})
            run_dir = Store(str(tmp_path / place))
            assert run(config, comm, run_dir)["status"] == "finished"
            newest = Checkpoints(run_dir.child("checkpoints")).newest()
            assert newest is not None
            digests.append(newest.digest())
        assert digests[0] == digests[1]
        failed = {exchange.fault for exchange in proxy.exchanges}
        assert failed >= {"refuse", "reset", "short", "flip_bit"}
        # A retry that is waiting at the end of the run ends by itself.
        wait_until(lambda: not any(t.name.startswith("fetch") for t in threading.enumerate()), "")


def test_run_on_s3_is_stopped_resumed_and_equals_one_on_disk(
    store: Store, options: dict[str, Any], tmp_path: Path
) -> None:
    """Data and run directory are on S3; after a stop, the run reads back what it wrote."""
    write_digits(store.child("digits"))
    config = load_config("digits", SHORT)
    there = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"url": f"{store.url}/digits", "storage_options": options}
            )
        }
    )
    asked: list[int] = []

    def stop_once() -> bool:
        asked.append(1)
        return len(asked) >= 2

    comm = LocalCommunicator(torch.device("cpu"))
    run_dir = store.child("run")
    assert run(there, comm, run_dir, should_stop=stop_once)["status"] == "interrupted"
    assert run(there, comm, run_dir)["status"] == "finished"
    run(config, comm, Store(str(tmp_path)))

    digests = []
    for folder in (run_dir, Store(str(tmp_path))):
        newest = Checkpoints(folder.child("checkpoints")).newest()
        assert newest is not None
        digests.append(newest.digest())
    assert digests[0] == digests[1]
    seen = [line["samples_seen"] for line in read_lines(run_dir, "metrics.jsonl")]
    assert seen == sorted(set(seen))
    assert seen[-1] == 640
    assert any("tfevents" in name for name in run_dir.list("tensorboard"))
    assert b'"secret": "***"' in run_dir.read("config.json")


def test_workers_continue_without_the_one_that_wrote(
    store: Store, moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another worker takes over the files, in an attempt of its own.

    Both write files of each checkpoint until then.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.address)
    canonical = ["run.reduction=canonical", "run.virtual_workers=2", "run.total_samples=2560"]
    config = load_config("digits", [*SHORT, *canonical])
    run(config, LocalCommunicator(torch.device("cpu")), Store(str(tmp_path)))
    (tmp_path / "small_files.py").write_text(SMALL_FILES)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config("digits", [*SHORT, *canonical, 'plugins=["small_files"]'])
    with Workers([1, 2], 2, config, store.url) as workers:
        workers.until(lambda: workers.step_of("w0") > 30)
        workers.kill("w0")
        outcomes = workers.finish()
    assert outcomes["w1"]["status"] == "finished"
    assert digest(store.url) == digest(tmp_path)
    assert any("-of-" in name for name in store.find("checkpoints"))
    rows = [row["samples_seen"] for row in read_lines(store, "metrics.jsonl")]
    assert rows == list(range(128, 2561, 128))
    (change,) = read_lines(store, "worker_changes.jsonl")
    assert (change["before"], change["workers"], change["attempt"]) == (2, 1, 2)
    assert [one["world_size"] for one in read_lines(store, "attempts.jsonl")] == [2, 1]


def test_folders_of_checkpoints_are_listed_a_thousand_at_a_time(moto: Server) -> None:
    """A run that keeps thousands of them resumes, and commits, with a few requests."""
    with Proxy(moto.address) as proxy:
        store = Store(f"{moto.new_bucket()}/checkpoints", moto.options(proxy.url))
        tensors = {f"part-{part}/weight": torch.full((4,), float(part)) for part in range(8)}
        retention = Retention(newest=10**6)
        with ThreadPoolExecutor(32) as pool:
            entry = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
            manifest = json.dumps({"version": 1, "files": {"state.json": entry}}).encode()
            for file, content in (("state.json", b"{}"), ("MANIFEST.json", manifest)):
                names = [f"{number:09d}.1/{file}" for number in range(1, 1101)]
                list(pool.map(partial(store.publish, data=content), names))
        checkpoints = Checkpoints(store, retention)
        checkpoints.save(1101, tensors, {"samples_seen": 1101}, attempt=2)
        checkpoints.wait()

        def listings(since: int) -> int:
            found = [e for e in proxy.exchanges[since:] if e.method == "GET"]
            return sum(exchange.path.count("/") < 3 for exchange in found)

        before = len(proxy.exchanges)
        for samples_seen in (1102, 1103, 1104):
            checkpoints.save(samples_seen, tensors, {"samples_seen": samples_seen}, attempt=2)
            checkpoints.wait()
        assert listings(before) == 3 * 2
        assert len(proxy.exchanges) - before == 3 * (len(tensors) + 2 + 2)
        assert proxy.most_at_once >= len(tensors)
        checkpoints.close()

        before = len(proxy.exchanges)
        newest = Checkpoints(store).newest()
        assert newest is not None
        assert newest.named_samples == 1104
        # One for each thousand folders, and for the files of this one.
        assert listings(before) == 2 + 1
        assert len(proxy.exchanges) - before <= 3 + len(tensors) + 3
        assert Checkpoints(store).has_any()
