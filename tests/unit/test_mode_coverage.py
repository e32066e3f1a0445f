"""The data set of stacked digits, and the benchmark of mode coverage."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cases import modes
from benchmarks.datasets import write_stacked_digits
from gatdist.config import DataConfig, load_config
from gatdist.data.builtin import digits
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.evaluation import classifier
from gatdist.storage import Store


def stacked(folder: Path, count: int = 2000) -> Dataset:
    write_stacked_digits(argparse.Namespace(count=count), Store(str(folder)))
    return open_dataset(DataConfig(url=str(folder)))


def test_each_class_is_the_number_that_its_channels_show_and_equally_frequent(
    tmp_path: Path,
) -> None:
    data = stacked(tmp_path)
    samples, labels = data.read(np.arange(data.num_samples))
    assert labels is not None
    assert data.sample_shape == (3, 8, 8)
    assert np.bincount(labels).tolist() == [2] * 1000
    images, shown = digits()
    which = {image.tobytes(): int(digit) for image, digit in zip(images, shown, strict=True)}
    for stack, label in zip(samples, labels, strict=True):
        found = [which[np.ascontiguousarray(stack[..., c]).tobytes()] for c in range(3)]
        assert found == [label // 100, label // 10 % 10, label % 10]
    assert len({sample.tobytes() for sample in samples}) == len(samples)


def test_it_is_the_same_each_time_it_is_written(tmp_path: Path) -> None:
    first, second = (stacked(tmp_path / name, 1000) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", modes.LOSSES)
def test_each_loss_is_trained_and_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "_NUM_STEPS", 20)
    monkeypatch.setattr(modes, "NUM_FAKES", 500)
    stacked(tmp_path / "data", 1000)
    found = modes.measured(tmp_path / "run", str(tmp_path / "data"), name, 0, 128)
    assert 1 <= found["modes"] <= 500
    assert 0 < found["kl"] <= np.log(1000)
    config = load_config("digits", modes.settings(name, "data", 0, 128))
    others = load_config("digits", modes.settings("nonsaturating", "data", 0, 128))
    assert (config.model.generator, config.optim) == (others.model.generator, others.optim)


def test_real_samples_cover_all_modes_and_lose_what_chance_costs(tmp_path: Path) -> None:
    data = stacked(tmp_path, 4000)
    found = modes.drawn(data, ["modes", "kl"], modes.FEATURES).metrics
    assert found["modes"] >= 999
    # Of n samples of K equal classes, about (K − 1)/2n nats, and what is misclassified.
    assert found["kl"] == pytest.approx(999 / 2 / modes.NUM_FAKES, rel=0.35)
