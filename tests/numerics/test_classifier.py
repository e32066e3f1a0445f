"""The classifier's training: accuracy, reproducibility, and caching."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from arrays import ALONE, CPU, Arrays, evaluator, fake_images, images
from gatdist.config import DataConfig, cache_folder
from gatdist.data.dataset import open_dataset
from gatdist.evaluation import classifier
from gatdist.evaluation.classifier import Classifier, ClassifierNetwork, train_classifier


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(url="builtin:digits"))


@pytest.fixture(scope="module")
def digits_evaluator(digits):
    return evaluator(digits)


def real_digits(digits, positions):
    samples, _ = digits.read(positions.numpy())
    return digits.sample_format.to_network(torch.from_numpy(samples))


def test_classifier_generalizes_to_held_out_digits(digits, digits_evaluator):
    evaluation = digits_evaluator(lambda positions: real_digits(digits, positions))
    assert evaluation.protocol["held_out_accuracy"] >= 0.97
    _, labels = digits.read(np.arange(digits.num_samples))
    found = np.array(evaluation.protocol["class_histogram"])
    assert np.abs(found - np.bincount(labels)).sum() <= 0.02 * digits.num_samples
    assert evaluation.metrics["class_share_min"] == found.min() / digits.num_samples


def test_real_digits_have_distance_0_to_themselves(digits, digits_evaluator):
    def nearly(positions):  # noise below half a level is lost in rounding to 8 bits
        noise = torch.rand(len(positions), 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return real_digits(digits, positions) + (noise - 0.5) * 0.9 / 127.5

    metrics = digits_evaluator(nearly).metrics
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert 0.1 < metrics["fid_real_split"] < 10  # features have about unit variance


def test_distances_grow_with_noise_and_with_missing_classes(digits, digits_evaluator):
    def noisy(level):
        def generate(positions):
            noise = torch.randn(len(positions), 1, 8, 8, generator=torch.Generator().manual_seed(0))
            return real_digits(digits, positions) + level * noise

        return digits_evaluator(generate).metrics

    measured = [noisy(level) for level in (0.0, 0.2, 0.4, 0.8)]
    for name in ("fid", "kid"):
        values = [metrics[name] for metrics in measured]
        assert values == sorted(values)
    _, labels = digits.read(np.arange(digits.num_samples))
    without_3 = torch.from_numpy(np.flatnonzero(labels != 3))
    lacking = digits_evaluator(lambda p: real_digits(digits, without_3[p % len(without_3)]))
    assert lacking.metrics["class_share_min"] < 0.02
    assert lacking.metrics["fid_over_real_split"] > 2


def test_training_the_classifier_does_not_change_the_runs_random_state(digits, monkeypatch):
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    torch.manual_seed(1)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    networks = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with torch.device("meta"):
            network = ClassifierNetwork(digits.sample_shape, digits.num_classes)
        train_classifier(network, digits, CPU)
        assert torch.get_num_threads() == num_threads
        networks.append(network.state_dict())
        torch.manual_seed(1)
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    # The same bits for any number of threads.
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())


def test_cache_avoids_training_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    first = evaluator(images())(fake_images)
    [cached] = (cache_folder() / "features").glob("classifier-*")
    assert cached.name == f"classifier-v1-{images().fingerprint[:16]}-3x6x9.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "train_classifier", None)  # would raise
        assert evaluator(images())(fake_images) == first
    for damaged in (b"", cached.read_bytes()[:-9], b"\0" * 100):
        cached.write_bytes(damaged)
        assert evaluator(images())(fake_images) == first
    other = evaluator(images(seed=1))(fake_images)
    assert other.protocol["features_digest"] != first.protocol["features_digest"]


def test_features_of_real_samples_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    first = evaluator(images())(fake_images)
    [kept] = (cache_folder() / "features").glob("real-*")

    read = []
    monkeypatch.setattr(Arrays, "read", lambda self, indices: read.append(indices))
    assert evaluator(images())(fake_images) == first
    assert read == []
    monkeypatch.undo()

    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    short = safetensors.torch.load(kept.read_bytes())["features"][:-1]
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-9], safetensors.torch.save({"features": short.clone()})):
        kept.write_bytes(damaged)
        assert evaluator(images())(fake_images) == first
        assert kept.read_bytes() == whole
    monkeypatch.setattr(torch, "__version__", "0.0")
    evaluator(images())(fake_images)
    assert len(list((cache_folder() / "features").glob("real-*"))) == 2


def test_features_of_bad_samples_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    bad = dataclasses.replace(images(), bad_samples={3: "no image"})
    evaluator(bad)(fake_images)
    assert list((cache_folder() / "features").glob("real-*")) == []


def test_unwritable_cache_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    assert evaluator(images())(fake_images).metrics["fid"] > 0


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (2, 2, 3), (1, 1, 1), (5, 33, 3), (64, 48, 3), (28, 28, 1)]
)
def test_images_of_any_size_have_features(shape, monkeypatch):
    monkeypatch.setattr(classifier, "_NUM_STEPS", 2)
    data = images(24, shape)
    extractor = Classifier(data, ALONE)
    extractor.prepare()
    features = extractor(data.sample_format.to_network(torch.from_numpy(data.samples)))
    assert features.shape == (24, extractor.num_features)
    assert features.isfinite().all()
    assert extractor.classify(features).shape == (24, data.num_classes)
