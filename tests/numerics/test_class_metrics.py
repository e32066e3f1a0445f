"""Inception score, FID per class, modes and KL, compared with formulas in NumPy and SciPy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from arrays import ALONE, Arrays, evaluator
from fake_communicator import FakeCommunicator
from gatdist.common.errors import ConfigError, DataError
from gatdist.evaluation import Extractor, SampleSet, classifier, metrics, register_feature_extractor
from gatdist.evaluation.distances import GaussianSums
from support import refused, spawn


def sample_set(features, **more):
    return SampleSet(features, GaussianSums.of(features), ALONE, **more)


def with_scores(scores):
    return sample_set(torch.zeros(len(scores), 1), scores=scores)


def with_classes(classes, num_classes):
    """Samples that are classified as these, without doubt."""
    return with_scores(1e4 * torch.eye(num_classes)[torch.as_tensor(classes)])


def normal(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


class TestInceptionScore:
    @staticmethod
    def measured(scores):
        samples = with_scores(scores)
        return metrics["inception_score"].measure(samples, samples)

    def test_it_is_the_published_formula_over_ten_splits(self):
        logits = 3 * normal(1003, 12)
        order = torch.randperm(1003, generator=torch.Generator().manual_seed(0)).numpy()
        values = []
        for split in np.array_split(order, 10):
            given = softmax(logits.numpy()[split], axis=1)
            mean = given.mean(axis=0)
            values.append(np.exp(entropy(given, np.broadcast_to(mean, given.shape), axis=1).mean()))
        found = self.measured(logits)
        assert found["inception_score"] == pytest.approx(np.mean(values), rel=1e-10)
        assert found["inception_score_std"] == pytest.approx(np.std(values), rel=1e-8)

    def test_samples_sorted_by_class_score_as_well_as_shuffled_ones(self):
        found = self.measured(1e4 * torch.eye(10)[torch.arange(10).repeat_interleave(1000)])
        assert found["inception_score"] == pytest.approx(10, rel=0.02)

    @pytest.mark.parametrize("count", [2, 9, 10, 11])
    def test_few_samples_are_scored_too(self, count):
        found = self.measured(normal(count, 4))
        assert 1 <= found["inception_score"] <= 4
        assert math.isfinite(found["inception_score_std"])


class TestModes:
    @pytest.mark.parametrize(
        ("counts", "modes", "kl"),
        [
            ([5, 5, 5, 5], 4, 0.0),
            ([20, 0, 0, 0], 1, math.log(4)),
            ([10, 10, 0, 0], 2, math.log(2)),
            ([3, 1, 0, 0], 2, 0.75 * math.log(3) + 0.25 * math.log(1)),
        ],
    )
    def test_of_a_histogram_made_by_hand(self, counts, modes, kl):
        samples = with_classes(np.repeat(np.arange(4), counts), 4)
        assert metrics["modes"].measure(samples, samples) == {"modes": modes}
        assert metrics["kl"].measure(samples, samples)["kl"] == pytest.approx(kl, abs=1e-12)

    def test_kl_is_scipys_entropy_relative_to_the_uniform_distribution(self):
        classes = np.random.default_rng(0).integers(0, 1000, 26_000) ** 2 // 1000
        samples = with_classes(classes, 1000)
        counts = np.bincount(classes, minlength=1000)
        expected = entropy(counts / counts.sum(), np.full(1000, 1e-3))
        assert metrics["kl"].measure(samples, samples)["kl"] == pytest.approx(expected, rel=1e-10)
        assert metrics["modes"].measure(samples, samples)["modes"] == (counts > 0).sum()


def labelled(n, d, num_classes, seed=0):
    """Points whose distribution depends on the class."""
    features, labels = normal(n, d, seed).float(), torch.arange(n) % num_classes
    return features * (1 + 0.1 * labels[:, None]) + labels[:, None], labels


class TestFidPerClass:
    num_classes = 4

    def measured(self, real, fake, comm=ALONE):
        (x, y), (u, v) = real, fake
        data = Arrays(x.numpy(), np.arange(self.num_classes))
        first = SampleSet(x, GaussianSums.of(x), comm, labels=y, dataset=data)
        second = SampleSet(u, GaussianSums.of(u), comm, labels=v)
        return metrics["fid_per_class"].measure(first, second)

    def test_it_is_the_frechet_distance_within_each_class(self):
        (x, y), (u, v) = labelled(400, 5, 4), labelled(300, 5, 4, seed=1)
        found = self.measured((x, y), (u, v))
        expected = []
        for label in range(4):
            a, b = x[y == label].double().numpy(), u[v == label].double().numpy()
            first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
            root = scipy.linalg.sqrtm(first @ second).real
            mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
            expected.append(mean + np.trace(first + second - 2 * root))
        assert [found[f"fid_class_{k}"] for k in range(4)] == pytest.approx(expected, rel=1e-6)
        assert found["fid_per_class"] == pytest.approx(np.mean(expected), rel=1e-6)
        assert found["fid_per_class_max"] == pytest.approx(max(expected), rel=1e-6)

    def test_classes_with_fewer_than_ten_samples_are_skipped(self):
        x, y = labelled(400, 5, 4)
        u, v = labelled(400, 5, 4, seed=1)
        rare = torch.cat([(v != 2).nonzero()[:, 0], (v == 2).nonzero()[:9, 0]])
        found = self.measured((x, y), (u[rare], v[rare]))
        assert {k for k in found if k.startswith("fid_class")} == {
            f"fid_class_{k}" for k in (0, 1, 3)
        }
        assert math.isnan(self.measured((x, y), (u[:12], v[:12]))["fid_per_class"])

    def test_features_that_are_not_finite_are_not_hidden(self):
        (x, y), (u, v) = labelled(400, 5, 4), labelled(400, 5, 4, seed=1)
        u[0] = torch.nan
        assert math.isnan(self.measured((x, y), (u, v))["fid_per_class"])

    def test_workers_share_the_classes(self):
        real, fake = labelled(400, 5, 4), labelled(400, 5, 4, seed=1)
        alone = self.measured(real, fake)

        class Second(FakeCommunicator):
            """Rank 1 of 2, with the result of a reduction known."""

            def all_reduce_(self, tensor):
                assert tensor[[0, 2]].tolist() == [0, 0]
                assert tensor[1] == alone["fid_class_1"]
                return torch.tensor([alone[f"fid_class_{k}"] for k in range(4)])

        assert self.measured(real, fake, Second(1, 2)) == pytest.approx(alone)

    def test_evaluator_caches_the_classes_of_real_samples(self):
        x, y = labelled(200, 3, 4)
        data = Arrays(x.numpy(), y.numpy())
        u, v = labelled(120, 3, 4, seed=1)

        def generate(positions):
            return u[positions]

        generate.labels = lambda positions: v[positions]
        asked = {"metrics": ["fid_per_class"], "features": "cached-points", "num_samples": 120}
        found = [evaluator(data, conditional=True, **asked)(generate).metrics for _ in range(2)]
        assert found[0] == found[1]
        assert found[0] == pytest.approx(self.measured((x, y), (u, v)), rel=1e-6)

    def test_generator_without_classes_is_rejected(self):
        with refused(ConfigError, "evaluate.metrics"):
            evaluator(Arrays(normal(20, 2).float().numpy()), metrics=["fid_per_class"])


@register_feature_extractor("cached-points")
class CachedPoints(Extractor):
    """Points, with a protocol, so that those of real samples are cached."""

    def __init__(self, dataset, comm):
        self.num_features = dataset.sample_format.shape[0]

    @property
    def protocol(self):
        return {"a": 1}

    def __call__(self, samples):
        return samples


def stacked(n=1200, kinds=3, channels=2, side=8):
    """Bars at ``kinds`` heights, stacked as channels; the class is the number that they spell."""
    shown = np.random.default_rng(0).integers(0, kinds, (n, channels))
    images = np.zeros((n, side, side, 3), dtype=np.uint8)
    for c in range(channels):
        images[np.arange(n), 1 + shown[:, c] * 2, :, c] = 200
    labels = sum(shown[:, c] * kinds ** (channels - 1 - c) for c in range(channels))
    return images, labels.astype(np.int64), shown


class TestChannelClassifier:
    def data(self):
        images, labels, shown = stacked(channels=3)
        return Arrays(images, labels), shown

    def test_the_class_is_spelled_by_the_channels(self, monkeypatch):
        monkeypatch.setattr(classifier, "_NUM_STEPS", 60)
        data, shown = self.data()
        real = data.sample_format.to_network(torch.from_numpy(data.samples))
        asked = {"metrics": ["modes", "kl"], "features": "channel_classifier"}
        found = evaluator(data, **asked)(lambda positions: real[positions])
        assert found.metrics["modes"] == 27
        assert found.protocol["class_histogram"] == np.bincount(data.labels).tolist()
        assert found.protocol["held_out_accuracy"] == 1
        # Without the last thing in the first channel, a third of the modes.
        some = torch.from_numpy(np.flatnonzero(shown[:, 0] < 2))
        fewer = evaluator(data, **asked)(lambda positions: real[some[positions % len(some)]])
        assert fewer.metrics["modes"] == 18
        assert fewer.metrics["kl"] > math.log(27 / 18) - 1e-9
        json.dumps(found.protocol)

    def test_scores_are_sums_of_the_channels_log_probabilities(self, monkeypatch):
        monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
        data, _ = self.data()
        extractor = classifier.ChannelClassifier(data, ALONE)
        extractor.prepare()
        samples = data.sample_format.to_network(torch.from_numpy(data.samples[:5]))
        with torch.no_grad():
            features = extractor(samples)
            found = extractor.classify(features)
            one = extractor._classifier
            parts = [one.classify(one(samples[:, c : c + 1])).numpy() for c in range(3)]
        assert features.shape == (5, extractor.num_features) == (5, 192)
        logs = [log_softmax(part, axis=1) for part in parts]
        expected = np.einsum("na,nb,nc->nabc", *map(np.exp, logs)).reshape(5, 27)
        assert np.exp(found.numpy()) == pytest.approx(expected, rel=1e-4, abs=1e-9)

    @pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 10), (3, 1), (3, 26), (3, 28)])
    def test_other_numbers_of_classes_are_rejected(self, channels, classes):
        images = np.zeros((60, 8, 8, channels), dtype=np.uint8)
        labels = np.arange(60) % classes
        with refused(DataError, "evaluate.features"):
            evaluator(Arrays(images, labels), metrics=["modes"], features="channel_classifier")


def measure_labelled(comm):
    """What one worker measures of samples with classes, in numbers that no world size divides."""
    x, y = labelled(601, 3, 4)
    u, v = labelled(307, 3, 4, seed=1)

    def generate(positions):
        return u[positions]

    generate.labels = lambda positions: v[positions]
    asked = {"metrics": ["fid_per_class", "fid"], "features": "points", "num_samples": 307}
    data = Arrays(x.numpy(), y.numpy())
    return evaluator(data, comm, conditional=True, **asked)(generate).metrics


def test_any_number_of_workers_measures_the_same_within_classes():
    by_rank = spawn(3, measure_labelled)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    assert by_rank[0] == pytest.approx(measure_labelled(ALONE), rel=1e-9)
