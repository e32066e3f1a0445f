"""Packing: every usable sample once, and the same bytes after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gatdist
from gatdist.common.errors import DataError
from gatdist.config import DataConfig
from gatdist.data.dataset import open_dataset
from gatdist.packing import convert
from gatdist.packing import task as tasks
from packing import content, image, pack, samples, write
from support import end_group, marked_processes, start_gatdist, wait_until


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty images in three classes, and two files that are no images."""
    files = {f"{'abc'[i % 3]}/{i}.png": image(i) for i in range(30)}
    return write(tmp_path / "source", files | {"a/bad.png": b"no image", "notes.md": b"#"})


# Content


NAMES = st.text("ab./é 日-", min_size=1, max_size=8).map(
    lambda name: "/".join(part.strip(".") for part in name.split("/") if part.strip(". ")) or "x"
)


@settings(max_examples=40)
@given(st.dictionaries(NAMES, st.sampled_from(["good", "bad", "other"]), min_size=1, max_size=12))
def test_every_usable_sample_is_packed_once(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    good: Counter[bytes] = Counter()
    bad = set()
    for number, (name, kind) in enumerate(kinds.items()):
        file = f"{name}-{number}.{'md' if kind == 'other' else 'png'}"
        data = image(number) if kind == "good" else b"bad"
        write(folder / "in", {file: data})
        if kind == "good":
            good[data] += 1
        else:
            bad.add(file)
    if not good:
        with pytest.raises(DataError):
            pack(folder / "in", folder / "out", labels="none", shard_bytes=3_000)
        return
    outcome = pack(folder / "in", folder / "out", labels="none", shard_bytes=3_000)
    assert Counter(sample["png"] for sample in samples(folder / "out")) == good
    assert (outcome["samples"], outcome["skipped"]) == (good.total(), len(bad))
    report = folder / "out" / "report.jsonl"
    lines = report.read_text().splitlines() if bad else []
    assert {json.loads(line)["source"] for line in lines} == bad


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # deprecation in webdataset
def test_packed_data_trains_and_opens_in_webdataset(source: Path, tmp_path: Path) -> None:
    outcome = pack(source, tmp_path / "out")
    assert outcome["samples"] == 30
    assert outcome["num_classes"] == 3
    assert outcome["shards"] == len(list((tmp_path / "out").glob("*.tar"))) > 2
    dataset = open_dataset(DataConfig(url=str(tmp_path / "out")))
    decoded, labels = dataset.read(np.arange(30))
    assert labels is not None
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(theirs) == 30
    for number, sample in enumerate(theirs):
        assert (sample["png"] == decoded[number]).all()
        assert sample["cls"] == labels[number]
    found = {(decoded[i].tobytes(), int(labels[i])) for i in range(30)}
    expected = {
        (np.asarray(Image.open(source / f"{'abc'[i % 3]}/{i}.png")).tobytes(), i % 3)
        for i in range(30)
    }
    assert found == expected


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # deprecation in webdataset
def test_classes_are_mixed_in_every_shard(tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": image(i, (1, 1)) for name in "ab" for i in range(200)}
    pack(write(tmp_path / "in", files), tmp_path / "out", shard_bytes=100_000)
    for shard in (tmp_path / "out").glob("*.tar"):
        labels = [s["cls"] for s in webdataset.WebDataset(str(shard), shardshuffle=False).decode()]
        assert len(labels) > 30
        assert 0.3 < np.mean(labels) < 0.7


def test_training_run_uses_packed_data(tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": image(i, (9, 12)) for name in "ab" for i in range(20)}
    outcome = pack(write(tmp_path / "in", files), tmp_path / "out", size=8)
    config = gatdist.load_config(
        "digits",
        [
            f"data.url={outcome['url']}",
            "data.resolution=8",
            "run.total_samples=32",
            "run.global_batch=8",
            "run.log_every_samples=32",
            "run.checkpoint_every_samples=32",
            'model.generator={name="residual", width=4}',
            'model.discriminator={name="residual", width=4}',
            "monitor.tensorboard=false",
            "evaluate.metrics=[]",
            "evaluate.every_samples=0",
        ],
    )
    assert gatdist.train(config, str(tmp_path / "run"), local=True)["samples_seen"] == 32


# Reproducibility


def test_workers_and_listing_order_change_no_byte(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "one", size=4)
    pack(source, tmp_path / "three", size=4, workers=3)
    # Another folder lists its files in another order.
    for path in sorted(source.rglob("*.*"), key=lambda path: path.read_bytes()):
        write(tmp_path / "copy", {str(path.relative_to(source)): path.read_bytes()})
    pack(tmp_path / "copy", tmp_path / "other", size=4)
    one, three, other = (content(tmp_path / name) for name in ("one", "three", "other"))
    assert len(one) > 10
    assert one == three
    assert {**one, "packing/plan.json": ""} == {**other, "packing/plan.json": ""}


# Functions at whose calls a packing can be killed, by name.
POINTS: dict[str, tuple[Any, str]] = {
    "a file is published": (os, "replace"),
    "a sample is converted": (convert.Images, "__call__"),
}


def pack_until(point: str, kill_at: int, when: str, source: Path, dest: Path, seen: Any) -> None:
    """Pack, and be killed before or after the ``kill_at``-th call; ``seen`` counts the calls."""
    owner, name = POINTS[point]
    original = getattr(owner, name)

    def patched(*arguments: Any) -> Any:
        seen.value += 1
        if seen.value == kill_at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return original(*arguments)
        finally:
            if seen.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, patched)
    pack(source, dest, size=4, shard_bytes=20_000)


@pytest.mark.parametrize(("point", "every"), [(name, 13 * i + 1) for i, name in enumerate(POINTS)])
def test_after_a_kill_at_any_point_the_same_command_gives_the_same_bytes(
    source: Path, tmp_path: Path, point: str, every: int
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gatdist.packing", "hypothesis", "pytest", "webdataset"])
    seen = context.Value("i", 0)

    def start(kill_at: int, when: str, dest: Path) -> int | None:
        seen.value = 0
        process = context.Process(
            target=pack_until, args=(point, kill_at, when, source, dest, seen)
        )
        process.start()
        process.join()
        return process.exitcode

    assert start(0, "", tmp_path / "undisturbed") == 0
    expected, count = content(tmp_path / "undisturbed"), seen.value
    assert count > 8
    for kill_at in range(1, count + 1, every):
        for when in ("before", "after"):
            dest = tmp_path / f"{kill_at} {when}"
            assert start(kill_at, when, dest) == -signal.SIGKILL
            assert start(0, "", dest) == 0
            assert content(dest) == expected, f"killed {when} {point} for the {kill_at}th time"


def test_complete_shards_are_not_packed_again(source: Path, tmp_path: Path) -> None:
    first = pack(source, tmp_path / "out")
    expected = content(tmp_path / "out")
    tar, index = tmp_path / "out" / "shard-000001.tar", tmp_path / "out" / "shard-000002.index.npy"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    index.unlink()
    packed = []
    original = tasks.write_shard
    with mock.patch.object(
        tasks, "write_shard", lambda *args: packed.append(args[1]) or original(*args)
    ):
        again = pack(source, tmp_path / "out")
    assert packed == ["shard-000001", "shard-000002"]
    assert content(tmp_path / "out") == expected
    assert {**first, "seconds": 0, "samples_per_s": 0} == {
        **again,
        "seconds": 0,
        "samples_per_s": 0,
    }


def test_killed_command_stops_its_workers_and_resumes(tmp_path: Path) -> None:
    files = {f"{i}.png": image(i % 400, (64, 64)) for i in range(2_000)}
    source = write(tmp_path / "in", files)
    mark = f"gatdist-pack-{os.getpid()}"
    command = ["pack", "in", "out", "--size", "48", "--shard-bytes", "100kB", "--workers", "2"]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start_gatdist(*command, cwd=tmp_path, env={"GATDIST_MARK": mark})
        try:
            before = len(list(tmp_path.glob("out/packing/shard-*.json")))
            wait_until(
                lambda before=before: len(list(tmp_path.glob("out/packing/shard-*.json"))) > before,
                "another shard to be packed",
            )
            process.send_signal(number)
            _, errors = process.communicate(timeout=300)
            wait_until(lambda: not marked_processes(mark), "the workers to end")
        finally:
            end_group(process)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert "Traceback" not in errors
    assert process.returncode == 75
    pack(source, tmp_path / "undisturbed", size=48, shard_bytes=100_000)
    pack(source, tmp_path / "out", size=48, shard_bytes=100_000)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
