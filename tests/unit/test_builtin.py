"""Embedded data sets, and how they are written to the cache folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gatdist.common.errors import DataError, UserError
from gatdist.config import DataConfig, load_config
from gatdist.data.dataset import open_dataset
from gatdist.data.order import SampleOrder
from support import refused


def test_digits_equal_scikit_learns() -> None:
    dataset = open_dataset(DataConfig(url="builtin:digits", resolution=8))
    assert (dataset.num_samples, dataset.num_shards, dataset.num_classes) == (1797, 4, 10)
    assert dataset.sample_shape == (1, 8, 8)
    pixels, labels = dataset.read(np.arange(1797))
    digits = load_digits()
    assert labels is not None
    assert (labels == digits.target).all()
    assert (pixels[..., 0] == np.round(digits.images * 255 / 16)).all()


def test_embedded_data_sets_never_change() -> None:
    # Saved runs depend on these fingerprints: a change requires a new version of the folders.
    digits = open_dataset(DataConfig(url="builtin:digits"))
    assert digits.fingerprint.startswith("c6c6404dbcf8")
    ring = open_dataset(DataConfig(url="builtin:ring"))
    assert ring.fingerprint.startswith("e50866d76065")


def test_ring_has_eight_narrow_modes() -> None:
    ring = open_dataset(DataConfig(url="builtin:ring"))
    assert (ring.num_samples, ring.sample_shape, ring.num_classes) == (20_000, (2,), 8)
    points, labels = ring.read(np.arange(4000))
    assert labels is not None
    for mode in range(8):
        cloud = points[labels == mode].astype(float)
        mean = [np.cos(mode * np.pi / 4), np.sin(mode * np.pi / 4)]
        assert len(cloud) == 500
        assert np.allclose(cloud.mean(axis=0), mean, atol=5 * 0.01 / np.sqrt(500))
        assert np.allclose(cloud.std(axis=0), 0.01, rtol=0.2)


def test_order_over_the_digits_shows_each_once() -> None:
    config = load_config("digits")
    dataset = open_dataset(config.data)
    order = SampleOrder.from_config(config, dataset.layout)
    assert sorted(order.indices(np.arange(1797)).tolist()) == list(range(1797))
    state = order.state()
    assert state["fingerprint"] == dataset.fingerprint
    # 64 streams request over 1,067 blocks; 1,797 samples give that many only one by one.
    assert (state["interleave"], state["block_bytes"]) == (64, 2048)


def test_unknown_embedded_data_set_is_rejected() -> None:
    with refused(DataError, "data.url"):
        open_dataset(DataConfig(url="builtin:digit"))


def test_unwritable_cache_folder_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path / "file"))
    with refused(UserError, "digits-v2"):
        open_dataset(DataConfig(url="builtin:digits"))


# Waits for a line on its standard input, so that several can be released at once.
PREPARE = """
import os, signal, sys
from gatdist.data import builtin
from gatdist.data.format import shard_files
if "--killed" in sys.argv:
    shard_files.write_manifest = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
print(builtin.prepare("builtin:digits"))
"""


@pytest.fixture
def preparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that write the digits to an empty cache folder on request."""
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PREPARE, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_concurrent_writers_create_one_data_set(
    preparing: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    processes = [preparing() for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    folder = tmp_path / "datasets" / "digits-v2"
    assert [process.communicate(timeout=300)[0] for process in processes] == [f"{folder}\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in folder.parent.iterdir()] == ["digits-v2"]
    assert len(open_dataset(DataConfig(url=str(folder))).read(np.arange(1797))[0]) == 1797


def test_leftovers_of_a_killed_process_are_ignored(
    preparing: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = preparing("--killed")
    process.communicate("go\n", timeout=300)
    assert process.returncode == -9
    left = list((tmp_path / "datasets").iterdir())
    assert len(list(left[0].glob("shard-*.tar"))) == 4
    assert not (tmp_path / "datasets" / "digits-v2").exists()
    assert open_dataset(DataConfig(url="builtin:digits")).num_samples == 1797


def test_opening_again_does_not_import_scikit_learn() -> None:
    open_dataset(DataConfig(url="builtin:digits"))
    program = """
import sys
from gatdist.config import DataConfig
from gatdist.data.dataset import open_dataset
open_dataset(DataConfig(url="builtin:digits")).read(range(64))
assert "sklearn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
