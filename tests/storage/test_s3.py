"""S3: a data set, and a run that is stopped and resumed, on a real server of that protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import Server

from gatdist.config import DataConfig, load_config
from gatdist.data import Loader, SampleOrder, open_dataset
from gatdist.data.builtin import write_digits
from gatdist.errors import DataError
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, read_lines
from gatdist.storage import Store
from gatdist.training.loop import run

pytestmark = pytest.mark.storage


@pytest.fixture
def options(moto: Server) -> dict[str, Any]:
    return moto.options(moto.address)


@pytest.fixture
def store(moto: Server, options: dict[str, Any]) -> Store:
    return Store(f"{moto.new_bucket()}/runs/a", options)


def test_options_may_come_from_the_environment(
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


def test_a_data_set_on_s3(store: Store, options: dict[str, Any]) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options)
    here, there = open_dataset(DataConfig(url="builtin:digits")), open_dataset(config)
    assert there.fingerprint == here.fingerprint
    order = SampleOrder.from_config(load_config("digits"), there)
    share = {"global_batch": 64, "rank": 0, "world_size": 2, "position": 640}
    with Loader(there, order, config=there.config, **share) as loader:
        for _ in range(3):
            batch = next(loader)
            samples, labels = here.read(order.indices(batch.positions.numpy()))
            assert (batch.samples.numpy() == samples).all()
            assert batch.labels is not None
            assert (batch.labels.numpy() == labels).all()


def test_a_shard_that_is_lost_or_replaced(store: Store, options: dict[str, Any]) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options)
    store.publish("shard-000003.tar", b"something else")
    with pytest.raises(DataError, match=r"shard-000003\.tar: has 14 bytes, the manifest says"):
        open_dataset(config).read(np.array([1796]))
    store.delete("manifest.json")
    with pytest.raises(DataError, match=r"holds 4 tars .* but no manifest\.json"):
        open_dataset(config)


def test_a_run_on_s3_is_stopped_resumed_and_ends_as_one_on_disk(
    store: Store, options: dict[str, Any], tmp_path: Path
) -> None:
    """Data and run directory are there; a stop in between makes it read back what it wrote."""
    write_digits(store.child("digits"))
    overrides = [
        "run.total_samples=640",
        "run.tick_samples=128",
        "run.checkpoint_samples=128",
        'model.generator={name="residual", width=4}',
        'model.discriminator={name="residual", width=4}',
        "evaluate.metrics=[]",
    ]
    config = load_config("digits", overrides)
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
