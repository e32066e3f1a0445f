"""The benchmarks of data loading and storage: their results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks import readers
from benchmarks.cases import data, storage
from gatdist.config import DataConfig
from gatdist.data.dataset import open_dataset
from support import PROGRAMS, need


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path / "cache"))


def test_random_images_are_distinct_and_reproducible() -> None:
    first = list(readers.images(20, 64))
    assert list(readers.images(20, 64)) == first
    assert len(set(first)) == 20
    assert set(first).isdisjoint(readers.images(20, 64, seed=1))
    assert simplejpeg.decode_jpeg(first[0]).shape == (64, 64, 3)


def test_random_images_compress_like_photographs() -> None:
    sizes = [len(content) for content in readers.images(10, 256)]
    assert 20_000 < np.mean(sizes) < 45_000


def test_random_images_are_written_once() -> None:
    folder = readers.image_folder(12, 64, 3)
    dataset = open_dataset(DataConfig(url=str(folder)))
    assert (dataset.num_samples, dataset.num_shards) == (12, 3)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert readers.image_folder(12, 64, 3) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--num", "900", "--size", "64", "--rounds", "2", "--threads", "1", "--case", "gatdist"]
    data.main([*words, "--out", str(out)])
    found = json.loads((out / "result.json").read_text())
    rates = {row["reader"]: row for row in found["cases"]}
    assert rates.keys() == {"bare_read", "bare_decode", "gatdist"}
    for row in found["cases"]:
        assert row["resolution"] == 64
        assert 0 < row["ratio_low"] <= row["ratio_to_limit"] <= row["ratio_high"]
    assert rates["bare_read"]["samples_per_s"] > rates["bare_decode"]["samples_per_s"]
    assert rates["bare_decode"]["ratio_to_limit"] == pytest.approx(1)
    assert len(found["memory"]["bytes_by_epoch"]) == 10
    assert found["order"]["num_samples"] == 100_000_000
    assert 0 < found["order"]["resident_bytes"] < 100e6
    packing = {row["name"]: row for row in found["packing"]}
    assert packing.keys() >= {"copy, gatdist", "png, gatdist", "jpeg, gatdist"}
    assert all(row["samples_per_s"] > 0 for row in packing.values())


@pytest.mark.parametrize("option", [["--case", "gatdits"], ["--rounds", "0"], ["--num", "0"]])
def test_invalid_options_are_rejected(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        data.main(option)
    assert option[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.storage
def test_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("nginx")
    monkeypatch.setenv("PATH", PROGRAMS)
    monkeypatch.setattr(storage, "_RESOLUTION", 64)
    storage.main(["--num", "256", "--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["concurrency"] for row in found["ranges"]] == [1, 4, 16]
    assert found["first_byte_s"] > storage.LATENCY_S
    cold, faults = found["cases"]
    for row in (cold, faults):
        assert row["samples_per_s"] > 0
        assert 0.9 < row["bytes_ratio"] < 1.2
    assert found["same_sequence"]
    for row in found["cache"]:
        assert 0.9 < row["bytes_ratio"] < 1.3


@pytest.mark.slow
def test_storage_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "there")
    out = str(tmp_path / "out")
    storage.main(["--url", url, "--num", "128", "--rounds", "1", "--out", out])
    shown = capsys.readouterr().out
    assert "16 concurrent ranges" in shown
    assert "4 ranks" in shown
