"""Telemetry on a real object store: upload volume, and the effects of rejections and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import Server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.proxy import Fault, Proxy
from gatdist.config import load_config
from gatdist.monitor import event_files, metrics, uploads
from gatdist.monitor.metrics import read_metrics
from gatdist.monitor.sinks import Monitor
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.report.findings import find
from gatdist.storage import Store
from gatdist.training.loop import run
from support import wait_until

pytestmark = pytest.mark.storage

TELEMETRY = ("*/tensorboard/*", "*/metrics/*", "*/metrics.jsonl", "*/samples/*", "*/profiles/*")
SMALL = [
    "run.total_samples=768",
    "run.log_every_samples=128",
    "run.checkpoint_every_samples=256",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "evaluate.metrics=[]",
    "monitor.profile_steps=[2, 3]",
]


@pytest.fixture
def bucket(moto: Server) -> str:
    return moto.new_bucket()


@pytest.fixture
def proxy(moto: Server) -> Iterator[Proxy]:
    with Proxy(moto.address) as there:
        yield there


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry for half a second instead of 10 s."""
    for module in (event_files, metrics, uploads):
        monkeypatch.setattr(module, "RETRY_BUDGET_S", 0.5)


def through(proxy: Proxy, moto: Server, bucket: str, **settings: Any) -> Store:
    return Store(f"{bucket}/runs/a", moto.options(proxy.url), **settings)


def reject(status: int = 503, *, paths: tuple[str, ...] = TELEMETRY) -> list[Fault]:
    fault = {"methods": ("PUT", "POST"), "requests": (0, 10**9), "status": status}
    return [Fault("refuse", path=path, **fault) for path in paths]  # type: ignore[arg-type]


def interval(samples_seen: int) -> dict[str, Any]:
    return {f"loss/{name}": 0.123456789 * samples_seen + name for name in range(60)}


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def show(monitor: Monitor, samples_seen: int) -> None:
    monitor.preview(samples_seen, "samples/fakes", noise(samples_seen))
    monitor.tick(samples_seen, interval(samples_seen))


def events(store: Store, folder: Path) -> EventAccumulator:
    """Return what TensorBoard's own reader finds."""
    folder.mkdir()
    for name in store.list("tensorboard"):
        (folder / name).write_bytes(store.read(f"tensorboard/{name}"))
    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()


def steps(found: EventAccumulator, tag: str = "loss/3") -> list[int]:
    return [event.step for event in found.Scalars(tag)]


def test_telemetry_upload_volume_is_linear_in_the_number_of_intervals(
    moto: Server, proxy: Proxy, bucket: str, tmp_path: Path
) -> None:
    store = through(proxy, moto, bucket)
    monitor = Monitor(store)
    for i in range(1, 301):
        show(monitor, 64 * i)
        monitor.flush(force=i % 10 == 0)  # as before a commit
        if i <= 50:
            wait_until(lambda: monitor._board.is_complete, "uploads")  # type: ignore[union-attr]
    assert [line["samples_seen"] for line in read_metrics(store).records][:10] == [
        64 * i for i in range(1, 11)
    ]
    monitor.close()
    assert monitor.missing == []
    sent = sum(x.num_sent for x in proxy.exchanges if x.method in ("PUT", "POST"))
    files = store.find()
    final = sum(size or 0 for size in files.values())
    assert final > 300 * 48 * 48 * 3
    assert sent <= 1.5 * final
    assert not any(name.startswith("metrics/") for name in files)
    found = events(store, tmp_path / "events")
    assert steps(found) == [64 * i for i in range(1, 301)]
    assert [image.step for image in found.Images("samples/fakes")] == steps(found)


def test_telemetry_segments_are_bounded_in_number(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}-{os.getpid()}/run")
    monitor = Monitor(store, tensorboard=False)
    most = 0
    for i in range(1, 5_001):
        monitor.tick(i, {"loss/generator": 1.0})
        monitor.flush()
        if i % 100 == 0:
            most = max(most, len(store.list("metrics")))
    assert most < 600
    assert len(read_metrics(store).records) > 4900
    monitor.close()
    assert [line["samples_seen"] for line in read_metrics(store).records] == [*range(1, 5_001)]
    store.delete("")


@pytest.mark.usefixtures("short_retries")
@pytest.mark.parametrize("status", [503, 500, 403, 429])
def test_telemetry_rejected_for_long_is_uploaded_at_the_next_interval(
    moto: Server, proxy: Proxy, bucket: str, tmp_path: Path, status: int
) -> None:
    store = through(proxy, moto, bucket, retry_budget_s=1.0)
    monitor = Monitor(store)
    show(monitor, 64)
    monitor.flush()
    wait_until(lambda: store.list("tensorboard"), "the first segment")
    proxy.faults = reject(status)
    for samples_seen in (128, 192, 256):
        show(monitor, samples_seen)
        monitor.uploads.add(f"samples/fakes-{samples_seen}.png", b"image")
        began = time.monotonic()
        monitor.flush()
        assert time.monotonic() - began < 20
        wait_until(lambda: monitor.uploads.error, "the upload to fail")
    assert monitor.error
    assert len(monitor.unwritten) == 3
    proxy.faults = ()
    show(monitor, 320)
    monitor.flush()
    wait_until(lambda: not monitor.error, "all to be uploaded")
    assert len(store.list("samples")) == 3
    assert monitor.unwritten == []
    monitor.close()
    assert monitor.missing == []
    expected = [64, 128, 192, 256, 320]
    assert [line["samples_seen"] for line in read_metrics(store).records] == expected
    assert steps(events(store, tmp_path / "events")) == expected


@pytest.mark.usefixtures("short_retries")
@pytest.mark.parametrize("lasts", [True, False])
def test_telemetry_rejection_never_ends_a_run(
    moto: Server, proxy: Proxy, bucket: str, lasts: bool
) -> None:
    """If it lasts until the end, one warning names what is missing, and a resume restores it."""
    store = through(proxy, moto, bucket, retry_budget_s=1.0)
    emitted: list[tuple[str, dict[str, Any]]] = []

    def emit(kind: str, fields: dict[str, Any]) -> None:
        emitted.append((kind, fields))
        if kind == "log" and fields["samples_seen"] == 512 and not lasts:
            proxy.faults = ()

    config = load_config("digits", SMALL)
    proxy.faults = reject()
    comm = LocalCommunicator(torch.device("cpu"))

    def stop() -> bool:
        return lasts and any(kind == "log" for kind, _ in emitted)

    outcome = run(config, comm, store, emit=emit, should_stop=stop)
    assert outcome["status"] == ("interrupted" if lasts else "finished")
    warnings = [fields["message"] for kind, fields in emitted if kind == "warning"]
    missing = [message for message in warnings if f"{store.url}: " in message]
    proxy.faults = ()
    if lasts:
        assert len(missing) == 1
        assert read_metrics(store).records == []
        assert run(config, comm, store)["status"] == "finished"
    else:
        assert missing == []
        assert len(store.list("samples")) == 7
        assert len(store.find("profiles")) == 2
    ticks = [fields["samples_seen"] for kind, fields in emitted if kind == "log"]
    found = read_metrics(store).records
    assert [line["samples_seen"] for line in found] == sorted({*ticks, *range(128, 769, 128)})
    assert store.list("metrics") == []
    assert inspect_last(store) == find(store).logs[-1]["samples_seen"] == 768


def inspect_last(store: Store) -> int:
    """Return the last line, by the function that the command ``inspect`` calls."""
    from gatdist.runs.inspection import _run

    last = _run(store)["last_log"]
    return int(last["samples_seen"])


KILLED = """
import json, sys
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.loop import run
import torch
url, options, settings = json.loads(sys.argv[1])
def emit(kind, fields):
    print(json.dumps([kind, fields.get("samples_seen"), fields.get("message")]), flush=True)
run(load_config("digits", settings), LocalCommunicator(torch.device("cpu")), Store(url, options),
    emit=emit)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("spool", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_telemetry_of_a_run_killed_and_resumed_without_room_for_temporary_files(
    moto: Server, bucket: str, tmp_path: Path, spool: str
) -> None:
    """No broken files, no duplicates."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "small", folder], check=True)
    try:
        if spool == "full":
            (folder / "full").write_bytes(bytes(16 * 2**10))
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        store = Store(f"{bucket}/runs/a", moto.options(moto.address))
        settings = [*SMALL, "run.total_samples=1280", "run.checkpoint_every_samples=256"]
        argument = json.dumps([store.url, moto.options(moto.address), settings])
        env = os.environ | {"TMPDIR": str(folder)}
        for kill_at in (640, None):
            child = subprocess.Popen(
                [sys.executable, "-c", KILLED, argument],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout
            for line in child.stdout:
                kind, samples_seen, _ = json.loads(line)
                if kind == "log" and kill_at and samples_seen >= kill_at:
                    child.send_signal(signal.SIGKILL)
                    break
            child.stdout.close()
            assert child.wait(60) == (0 if kill_at is None else -signal.SIGKILL)
    finally:
        subprocess.run(["umount", folder], check=True)
    expected = [128 * i for i in range(1, 11)]
    lines = store.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["samples_seen"] for line in lines] == expected
    found = steps(events(store, tmp_path / "events"), "loss/generator")
    assert found == expected
