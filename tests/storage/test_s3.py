"""S3: the storage's promises and a data set, on a real server of that protocol (moto)."""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import pytest
import torch

from gatdist.config import DataConfig, load_config
from gatdist.data import Loader, SampleOrder, open_dataset
from gatdist.data.builtin import write_digits
from gatdist.errors import DataError, StorageError, StorageUnavailableError
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, read_lines
from gatdist.storage import Store
from gatdist.training.loop import run
from support import free_port, wait_until

pytestmark = pytest.mark.storage


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=1):
                return True
        except OSError:
            return False

    try:
        wait_until(answers, "the S3 server to answer")
        yield url
    finally:
        server.terminate()
        server.wait()
        log.close()


def options(endpoint: str) -> dict[str, Any]:
    # Of the three that would try again, s3fs, botocore and the store, botocore is kept from it.
    return {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": endpoint},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }


@pytest.fixture
def store(endpoint: str) -> Store:
    bucket = f"bucket-{uuid4()}"
    request = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    return Store(f"s3://{bucket}/runs/a", options(endpoint))


def test_files_come_and_go(store: Store, tmp_path: Path) -> None:
    assert not store.exists()
    assert store.list() == []
    store.publish("a/b.bin", b"first")
    store.publish("a/b.bin", b"0123456789")
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    store.publish_file("c.bin", source)
    store.append("lines", "one\n")
    store.append("lines", "two\n")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.child("a").size("b.bin") == 10
    assert store.read("c.bin") == b"from a file"
    assert store.read("lines") == b"one\ntwo\n"
    assert store.exists("a")
    assert store.list() == ["a", "c.bin", "lines"]
    assert store.list("a") == ["b.bin"]
    store.delete("a")
    store.delete("c.bin")
    store.delete("c.bin")
    assert store.list() == ["lines"]


def test_ranges(store: Store) -> None:
    store.publish("x", b"0123456789")
    assert store.read_ranges([("x", 8, 10), ("x", 3, 3), ("x", 0, 4)]) == [b"89", b"", b"0123"]
    with pytest.raises(StorageError, match=r"x: gave 2 bytes for the range 8 to 12 \(of 10\)"):
        store.read_ranges([("x", 8, 12)])


def test_what_others_write_is_seen_at_once(store: Store) -> None:
    other = Store(store.url, store._options)
    assert other.list() == []
    store.publish("x", b"1")
    assert other.list() == ["x"]
    assert other.read("x") == b"1"
    store.publish("x", b"22")
    assert other.size("x") == 2
    store.delete("x")
    assert not other.exists("x")


def test_what_is_missing_is_named(store: Store, endpoint: str) -> None:
    with pytest.raises(StorageError, match=r"runs/a/no\.bin: does not exist"):
        store.read("no.bin")
    with pytest.raises(StorageError, match="bucket must exist already"):
        Store("s3://no-such-bucket/run", options(endpoint)).publish("x", b"1")


def test_options_may_come_from_the_environment(
    store: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("x", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert Store(store.url).read("x") == b"1"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("GATDIST_TEST_ENDPOINT", endpoint)
    referring = {"client_kwargs": {"endpoint_url": "${env:GATDIST_TEST_ENDPOINT}"}}
    assert Store(store.url, referring).read("x") == b"1"


def test_a_server_that_is_down_is_told_apart() -> None:
    store = Store("s3://bucket/run", options(f"http://127.0.0.1:{free_port()}"), retry_budget_s=0.1)
    with pytest.raises(StorageUnavailableError, match="run/x: storage kept failing"):
        store.read("x")


class Failing(BaseHTTPRequestHandler):
    """Passes GET requests on to ``upstream``, after having refused the first ones."""

    upstream = ""
    refusals = 0
    seen: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        if type(self).refusals > 0:
            type(self).refusals -= 1
            self._answer(503, b"")
            return
        # The signature names the host that was asked.
        headers = {name: self.headers[name] for name in self.headers}
        request = urllib.request.Request(self.upstream + self.path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            self._answer(answer.status, answer.read())

    def _answer(self, status: int, body: bytes) -> None:
        self.seen.append(status)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def failing(endpoint: str) -> Iterator[str]:
    Failing.upstream, Failing.refusals = endpoint, 0
    Failing.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_more_refusals_than_s3fs_bears(store: Store, failing: str) -> None:
    store.publish("x", b"0123456789")
    Failing.refusals = 7  # s3fs gives up after five
    through = Store(store.url, options(failing))
    assert through.read_ranges([("x", 2, 5)]) == [b"234"]
    assert Failing.seen.count(503) == 7


def test_a_data_set_on_s3(store: Store, endpoint: str) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options(endpoint))
    here, there = open_dataset(DataConfig(url="builtin:digits")), open_dataset(config)
    assert there.fingerprint == here.fingerprint
    order = SampleOrder.from_config(load_config("digits"), there)
    with Loader(there, order, global_batch=64, rank=0, world_size=2, position=640) as loader:
        for _ in range(3):
            batch = next(loader)
            samples, labels = here.read(order.indices(batch.positions.numpy()))
            assert (batch.samples.numpy() == samples).all()
            assert batch.labels is not None
            assert (batch.labels.numpy() == labels).all()


def test_a_shard_that_is_lost_or_replaced(store: Store, endpoint: str) -> None:
    write_digits(store)
    config = DataConfig(url=store.url, storage_options=options(endpoint))
    store.publish("shard-000003.tar", b"something else")
    with pytest.raises(DataError, match=r"shard-000003\.tar: has 14 bytes, the manifest says"):
        open_dataset(config).read(np.array([1796]))
    store.delete("manifest.json")
    with pytest.raises(DataError, match=r"holds 4 tars .* but no manifest\.json"):
        open_dataset(config)


def test_a_run_on_s3_is_stopped_resumed_and_ends_as_one_on_disk(
    store: Store, endpoint: str, tmp_path: Path
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
                update={"url": f"{store.url}/digits", "storage_options": options(endpoint)}
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
