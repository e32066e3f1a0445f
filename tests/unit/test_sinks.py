"""The sinks on real folders: written files, truncation on resume, and failures."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from gatdist.config import parse_config
from gatdist.monitor.metrics import MetricsWriter, read_metrics
from gatdist.monitor.sinks import Monitor
from gatdist.monitor.tags import charts_of
from gatdist.storage import Store
from support import wait_until

CONFIG = parse_config(
    {
        "run": {"total_samples": 1000, "storage_options": {"secret": "hunter2"}},
        "data": {"url": "builtin:digits"},
        "evaluate": {"metrics": ["fid"]},
    }
)


@pytest.fixture(autouse=True)
def spool(tmp_path, monkeypatch):
    """The folder of temporary files; empty again after each test."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in run_dir.read(name).decode().splitlines()]


def seen(run_dir):
    return [line["samples_seen"] for line in read_metrics(run_dir).records]


def record(monitor, *ticks):
    for samples_seen in ticks:
        monitor.tick(samples_seen, {"loss/generator": samples_seen / 10, "world_size": 2})
        monitor.flush()


def events(run_dir, folder):
    """Return what TensorBoard's own reader finds in the run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder.mkdir()
    for name in run_dir.list("tensorboard"):
        (folder / name).write_bytes(run_dir.read(f"tensorboard/{name}"))
    return EventAccumulator(str(folder)).Reload()


def test_each_log_interval_is_written_at_once(run_dir):
    monitor = Monitor(run_dir, tensorboard=False)
    record(monitor, 64)
    expected = {"samples_seen": 64, "loss/generator": 6.4, "world_size": 2}
    assert read_metrics(run_dir).records == [expected]
    record(monitor, 128)
    assert seen(run_dir) == [64, 128]
    monitor.close()
    assert run_dir.list() == ["metrics.jsonl"]
    assert [line["samples_seen"] for line in lines(run_dir)] == [64, 128]


@pytest.mark.parametrize("flushed", [True, False])
def test_second_call_at_the_same_step_extends_the_line(run_dir, flushed):
    monitor = Monitor(run_dir, tensorboard=False)
    record(monitor, 64)
    monitor.tick(128, {"loss/generator": 12.8, "world_size": 2})
    if flushed:
        monitor.flush()
    monitor.tick(128, {"metric/fid": 3.5})
    monitor.flush()
    expected = [
        {"samples_seen": 64, "loss/generator": 6.4, "world_size": 2},
        {"samples_seen": 128, "loss/generator": 12.8, "world_size": 2, "metric/fid": 3.5},
    ]
    assert read_metrics(run_dir).records == expected
    record(monitor, 192)
    assert seen(run_dir) == [64, 128, 192]
    with pytest.raises(AssertionError):
        monitor.tick(191, {})
    monitor.close()
    assert lines(run_dir)[:2] == expected


def test_numbers_that_json_does_not_support_are_null(run_dir):
    monitor = Monitor(run_dir, tensorboard=False)
    monitor.tick(64, {"a/nan": math.nan, "a/inf": -math.inf, "a/int": 3, "protocol": {"data": "x"}})
    monitor.close()
    text = run_dir.read("metrics.jsonl").decode()

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "samples_seen": 64,
        "a/nan": None,
        "a/inf": None,
        "a/int": 3,
        "protocol": {"data": "x"},
    }


@pytest.mark.parametrize(
    ("resume", "kept"), [(0, []), (63, []), (64, [64]), (150, [64, 128]), (9999, [64, 128, 192])]
)
def test_resuming_truncates_what_came_after_the_checkpoint(run_dir, resume, kept):
    monitor = Monitor(run_dir, tensorboard=False)
    record(monitor, 64, 128, 192)
    monitor.close(publish=False)
    run_dir.append("metrics.jsonl", '{"samples_seen": 256, "loss/gen')  # truncated by a kill
    resumed = Monitor(run_dir, tensorboard=False, resume_samples=resume)
    assert seen(run_dir) == kept
    record(resumed, 10_000, 10_064)
    resumed.close()
    assert [line["samples_seen"] for line in lines(run_dir)] == [*kept, 10_000, 10_064]
    assert not run_dir.list("metrics")


def test_complete_file_is_not_rewritten_and_a_rewritten_one_is_published_atomically(tmp_path):
    store = Store(str(tmp_path))
    monitor = Monitor(store, tensorboard=False)
    record(monitor, 64, 128)
    monitor.close()
    before = (tmp_path / "metrics.jsonl").stat()
    MetricsWriter(store, 128)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    with (
        tmp_path / "metrics.jsonl"
    ).open() as reader:  # opened before, it still reads all of the old file
        MetricsWriter(store, 64)
        assert len(reader.readlines()) == 2
    assert len(lines(store)) == 1


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x00", b"[1, 2]\n", b'{"samples_seen": "64"}\n', b"\n"]
)
def test_invalid_lines_are_removed(run_dir, damage):
    good = b'{"samples_seen": 64}\n'
    run_dir.publish("metrics.jsonl", good + damage)
    MetricsWriter(run_dir, 100)
    assert run_dir.read("metrics.jsonl") == good


def test_tensorboard_shows_the_resumed_run_as_one_curve(run_dir, tmp_path):
    first = Monitor(run_dir)
    record(first, 64, 128, 192, 256)
    first.close()
    second = Monitor(run_dir, resume_samples=128)
    record(second, 193, 257)
    second.close()
    found = events(run_dir, tmp_path / "read")
    assert found.Tags()["scalars"] == ["loss/generator"]  # the world size has no tag
    curve = [(event.step, event.value) for event in found.Scalars("loss/generator")]
    assert [step for step, _ in curve] == [64, 128, 193, 257]
    assert [value for _, value in curve] == pytest.approx([6.4, 12.8, 19.3, 25.7])


def test_tensorboard_has_images_texts_and_hyperparameters_in_the_same_run(run_dir, tmp_path):
    monitor = Monitor(run_dir)
    monitor.text("configuration", "| key | value |")
    monitor.hparams(CONFIG)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    monitor.preview(64, "samples/fakes", image)
    monitor.preview(128, "samples/gray", image[..., :1])
    clip = np.sin(np.arange(800) / 10, dtype=np.float32).reshape(2, 400)
    monitor.preview(128, "samples/heard", audio=(clip, 8000), text="<b>\n# one line each")
    monitor.tick(128, {"metric/fid": 3.0})
    monitor.close()
    found = events(run_dir, tmp_path / "read")
    assert found.Tags()["images"] == ["samples/fakes", "samples/gray"]
    [image] = found.Images("samples/fakes")
    assert (image.step, image.width, image.height) == (64, 30, 20)
    [audio] = found.Audio("samples/heard/audio")
    assert (audio.step, audio.sample_rate, audio.length_frames) == (128, 8000, 400)
    [lines] = found.Tensors("samples/heard/text_summary")
    assert lines.tensor_proto.string_val == [b"    <b>\n    # one line each"]
    [text] = found.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val == [b"| key | value |"]

    from tensorboard.plugins.hparams import plugin_data_pb2

    described = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(described).session_start_info
    assert start.hparams["run.global_batch"].number_value == 64
    assert start.hparams["game.loss"].string_value == "nonsaturating"
    assert start.hparams["model.conditional"].string_value == "false"
    assert "hunter2" not in str(start)
    described = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(described).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["metric/fid"]


def test_logs_are_visible_during_the_run(run_dir, tmp_path):
    monitor = Monitor(run_dir)
    record(monitor, 64)
    tries = itertools.count()

    def found():
        read = events(run_dir, tmp_path / f"read{next(tries)}")
        return "loss/generator" in read.Tags()["scalars"] and read

    assert len(wait_until(found, "the first scalar").Scalars("loss/generator")) == 1
    monitor.close()


def test_unwritable_tensorboard_is_reported_and_the_rest_continues(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    monitor = Monitor(Store(str(tmp_path)))
    record(monitor, 64, 128)
    monitor.close()
    assert "/tensorboard" in monitor.error
    assert len(monitor.missing) == 1
    assert len(lines(Store(str(tmp_path)))) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_gets_complete_lines_or_none(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", folder], check=True)
    try:
        store = Store(str(folder), retry_budget_s=0.1)
        monitor = Monitor(store, tensorboard=False)

        for step in range(1, 200):
            monitor.tick(step, {f"a/{name}": 0.123456 for name in range(50)})
            monitor.flush(force=True)
            if monitor.error:
                break
        assert "No space left" in monitor.error
        assert store.read("metrics.jsonl").endswith(b"}\n")
        assert seen(store) == list(range(1, step))
        subprocess.run(["mount", "-o", "remount,size=1m", folder], check=True)
        monitor.flush(force=True)
        assert not monitor.error
        assert seen(store) == list(range(1, step + 1))
        monitor.close()
        assert not monitor.missing
    finally:
        subprocess.run(["umount", folder], check=True)


def test_tensorboard_is_not_imported_before_it_is_needed():
    code = (
        "import sys, gatdist.monitor, gatdist.monitor.console\n"
        "print([name for name in ('tensorboard', 'torch', 'fsspec') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_chart_layout_is_written_once_and_again_only_for_new_metrics(run_dir, tmp_path):
    monitor = Monitor(run_dir)
    for samples_seen in (64, 128, 192, 256):
        more = {"metric/fid": 3.0, "metric/fid_real_split": 1.0} if samples_seen > 128 else {}
        monitor.tick(samples_seen, {"loss/generator": 1.0, "loss/discriminator": 0.5} | more)
        monitor.flush()
    monitor.close()
    layouts = events(run_dir, tmp_path / "copy").Tensors("custom_scalars__config__")
    assert [event.step for event in layouts] == [64, 192]
    found = layout_pb2.Layout.FromString(layouts[-1].tensor_proto.string_val[0])
    charts = {c.title: [(d.title, *d.multiline.tag) for d in c.chart] for c in found.category}
    assert charts == {
        "Players": [("Losses", "(loss/(generator|discriminator))$")],
        "Metrics": [("fid", "(metric/fid(_real_split)?)$")],
    }


def test_every_tag_of_a_run_has_a_chart():
    tags = ["metric/fid_real_split", "metric/kid", "metric/fid", "metric/fid_over_real_split"]
    placed = charts_of([*tags, "penalty/r1", "nothing/known"])
    assert [chart.title for chart in placed["Metrics"]] == ["kid", "fid", "fid_over_real_split"]
    assert [chart.tags(tags) for chart in placed["Metrics"]][1] == [
        "metric/fid_real_split",
        "metric/fid",
    ]
    assert placed["Players"][0].tags(["penalty/r1"]) == ["penalty/r1"]
