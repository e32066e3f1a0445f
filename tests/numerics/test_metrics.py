"""Metrics: closed forms, torchmetrics as reference, and equality over workers."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from arrays import ALONE, Arrays, evaluator, fake_images, fake_points, images, points
from fake_communicator import FakeCommunicator
from gatdist.common.errors import ConfigError, DataError, PluginError
from gatdist.evaluation import (
    Extractor,
    SampleSet,
    classifier,
    distances,
    metrics,
    register_feature_extractor,
)
from gatdist.evaluation.distances import (
    GaussianSums,
    cross_similarity,
    frechet_distance,
    self_similarity,
    split_half_distance,
)
from support import refused, spawn


def normal(n, d, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def gaussian(mean, covariance, n=1000):
    """Return the sums of n samples with exactly this mean and unbiased covariance."""
    outer = (n - 1) * covariance + n * torch.outer(mean, mean)
    return GaussianSums(torch.tensor(float(n), dtype=torch.float64), n * mean, outer)


def fid(x, y):
    return frechet_distance(GaussianSums.of(x), GaussianSums.of(y))


def kid(x, y, comm=ALONE):
    return self_similarity(x, comm) + self_similarity(y, comm) - 2 * cross_similarity(x, y, comm)


# Closed forms


@pytest.mark.parametrize("d", [1, 2, 64])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_frechet_distance_of_two_gaussians(d, scale):
    eye, mean = torch.eye(d, dtype=torch.float64), normal(1, d)[0]
    first = gaussian(torch.zeros(d, dtype=torch.float64), eye)
    second = gaussian(mean, scale**2 * eye)
    expected = float(mean @ mean) + d * (1 - scale) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_frechet_distance_of_commuting_covariances():
    # Diagonal in a rotated basis: the distance is that of the eigenvalues' square roots.
    q, _ = torch.linalg.qr(normal(5, 5))
    a, b = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(5, dtype=torch.float64)
    distance = frechet_distance(
        gaussian(zero, q @ a.diag() @ q.T), gaussian(zero, q @ b.diag() @ q.T)
    )
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_frechet_distance_of_two_samples_of_one_distribution():
    n, d, rounds = 2000, 8, 40
    distances = [fid(normal(n, d, seed), normal(n, d, seed + rounds)) for seed in range(rounds)]
    assert np.mean(distances) == pytest.approx(d * (d + 5) / (2 * n), rel=0.1)


def test_real_split_distance_equals_that_of_two_samples_of_half_the_size():
    n, d = 4000, 16
    assert split_half_distance(normal(n, d)) == pytest.approx(d * (d + 5) / n, rel=0.15)
    assert split_half_distance(normal(n, d)) == split_half_distance(normal(n, d))


def test_kernel_distance_of_two_gaussians():
    d, n = 64, 2000
    mean = torch.zeros(d, dtype=torch.float64)
    mean[0] = 2.0
    distances = [kid(normal(n, d, seed), normal(n, d, seed + 9) + mean) for seed in range(6)]
    assert np.mean(distances) == pytest.approx(0.20285, rel=0.02)


def test_kernel_distance_is_unbiased():
    # Between samples of one distribution its mean is 0, so about half of the values are negative.
    distances = [kid(normal(60, 4, seed), normal(50, 4, seed + 500)) for seed in range(300)]
    assert abs(np.mean(distances)) < 4 * np.std(distances) / np.sqrt(len(distances))
    assert 0.3 < np.mean(np.array(distances) < 0) < 0.8


def test_kernel_distance_is_the_double_sum_of_its_definition():
    x, y = normal(7, 3), normal(5, 3, seed=1)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 35
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kernel_matrix_in_blocks_equals_the_whole(monkeypatch):
    x, y = normal(50, 3), normal(40, 3, seed=1)
    whole = kid(x, y)
    monkeypatch.setattr("gatdist.evaluation.distances._MAX_ENTRIES", 77)
    assert kid(x, y) == pytest.approx(whole, rel=1e-12)


# Edge cases


def test_frechet_distance_is_symmetric_and_0_to_itself():
    x, y = normal(100, 6) @ normal(6, 6, 1), normal(80, 6, 2, mean=3.0)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_features_have_a_distance():
    x, y = normal(5, 64), normal(6, 64, seed=1)
    assert fid(x, y) > 0
    assert fid(x, x) == pytest.approx(0, abs=1e-5)


def test_diverged_generator_has_no_distance_and_does_not_crash():
    x = normal(10, 3)
    x[3, 1] = float("nan")
    assert np.isnan(fid(x, normal(10, 3)))
    evaluation = evaluator(points())(lambda positions: torch.full((len(positions), 2), torch.nan))
    assert np.isnan(evaluation.metrics["fid"])
    assert np.isnan(evaluation.metrics["kid"])


def test_sums_far_from_zero_keep_their_digits():
    x, y = normal(500, 4), normal(500, 4, seed=1, scale=2.0)
    assert fid(x + 1000, y + 1000) == pytest.approx(fid(x, y), rel=1e-6)


# torchmetrics


class Identity(nn.Module):
    num_features = 16

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_distances_equal_those_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x = normal(300, 16) @ normal(16, 16, seed=1)
    y = normal(300, 16, seed=2, mean=0.3) @ normal(16, 16, seed=3)
    frechet = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300)
    for metric in (frechet, kernel):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert fid(x, y) == pytest.approx(float(frechet.compute()), rel=1e-9)
    assert kid(x, y) == pytest.approx(float(kernel.compute()[0]), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`:UserWarning", "ignore:std:UserWarning")
def test_inception_score_equals_that_of_torchmetrics(monkeypatch):
    from torchmetrics.image.inception import InceptionScore

    # Both shuffle before they split, in different orders.
    monkeypatch.setattr(sys.modules[SampleSet.__module__], "_SCORE_SPLITS", 1)
    logits = 3 * normal(200, 16, seed=4)
    theirs = InceptionScore(feature=Identity(), splits=1).set_dtype(torch.float64)
    theirs.update(logits)
    fakes = SampleSet(logits, GaussianSums.of(logits), ALONE, scores=logits)
    found = metrics["inception_score"].measure(fakes, fakes)["inception_score"]
    assert found == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


# Over workers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_of_parts_equal_the_sums_of_the_whole(world_size):
    x, y = normal(301, 5), normal(200, 5, seed=1)
    parts = [GaussianSums.of(x[rank::world_size]) for rank in range(world_size)]
    together = GaussianSums(*(sum(getattr(p, name) for p in parts) for name in vars(parts[0])))
    other = GaussianSums.of(y)
    assert frechet_distance(together, other) == pytest.approx(fid(x, y), rel=1e-10)


def test_reduction_is_the_sum_over_workers():
    sums = GaussianSums.of(normal(10, 3)).reduced(FakeCommunicator(1, 3))
    assert float(sums.count) == 30
    assert torch.equal(sums.mean, GaussianSums.of(normal(10, 3)).mean)


def measure(comm):
    """Return one worker's metrics of points and images, with counts that no world size divides."""
    of_points = evaluator(points(401), comm, num_samples=307)(fake_points)
    classifier._NUM_STEPS = 3
    of_images = evaluator(images(101), comm, num_samples=97)(fake_images)
    return [(e.metrics, e.protocol) for e in (of_points, of_images)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_workers_gives_the_same_metrics(world_size, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    [alone_points, alone_images] = measure(ALONE)
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))  # worker 0 of the group trains again
    by_rank = spawn(world_size, measure)
    assert all(result == by_rank[0] for result in by_rank)
    [of_points, of_images] = by_rank[0]
    assert of_points[0] == pytest.approx(alone_points[0], rel=1e-9)
    # Convolutions round differently for another batch size.
    assert of_images[0] == pytest.approx(alone_images[0], rel=1e-3)
    assert of_points[1] == alone_points[1]
    assert of_images[1] == alone_images[1]


def measure_otherwise(comm):
    """Measure with eigenvalues that differ between the workers, as they may between GPUs."""
    exact = distances.frechet_distance
    distances.frechet_distance = lambda a, b: exact(a, b) + 0.5 * comm.rank
    return evaluator(points(101), comm, num_samples=90, metrics=["fid", "kid"])(fake_points)


def test_metrics_are_those_of_worker_0():
    alone = evaluator(points(101), num_samples=90, metrics=["fid", "kid"])(fake_points)
    first, second = spawn(2, measure_otherwise)
    assert first == second
    assert first.metrics == pytest.approx(alone.metrics, rel=1e-9)


# The evaluator


def test_each_position_is_generated_once_in_total():
    asked = [[], [], []]
    for rank in range(3):

        def generate(positions, rank=rank):
            asked[rank] += positions.tolist()
            return fake_points(positions)

        evaluator(points(), FakeCommunicator(rank, 3), num_samples=1000)(generate)
    assert sorted(itertools.chain(*asked)) == list(range(1000))


def test_as_many_are_generated_as_there_are_real_samples():
    asked = []

    def generate(positions):
        asked.extend(positions.tolist())
        return fake_points(positions)

    protocol = evaluator(points(333))(generate).protocol
    assert asked == list(range(333))
    assert protocol["num_real"] == protocol["num_generated"] == 333
    assert protocol["features"] == "points"
    assert protocol["data"] == points(333).fingerprint
    assert json.loads(json.dumps(protocol)) == protocol


def test_points_are_compared_without_features():
    data = points(500)
    evaluation = evaluator(data)(fake_points)
    x, y = torch.from_numpy(data.samples), fake_points(torch.arange(500)).float()
    assert evaluation.metrics == pytest.approx(
        {
            "fid": fid(x, y),
            "fid_real_split": split_half_distance(x),
            "fid_over_real_split": fid(x, y) / split_half_distance(x),
            "kid": kid(x, y),
        },
        rel=1e-6,
    )


def test_real_data_is_read_once():
    class Counted(Arrays):
        reads = 0

        def read(self, indices):
            self.reads += len(indices)
            return super().read(indices)

    data = Counted(points(300).samples)
    measured = evaluator(data)
    assert measured(fake_points) == measured(fake_points)
    assert data.reads == 300


def test_only_requested_metrics_are_computed():
    assert list(evaluator(points(), metrics=["kid"])(fake_points).metrics) == ["kid"]
    assert evaluator(points(1), metrics=[])  # reads no data
    assert evaluator(Arrays(images().samples), metrics=[])


@pytest.mark.parametrize(
    ("dataset", "config", "error", "field", "fact"),
    [
        (points(), {"metrics": ["fidd"]}, ConfigError, "evaluate.metrics", "'fid'"),
        (points(), {"features": "imagenet"}, ConfigError, "evaluate.features", "'imagenet'"),
        (points(), {"num_samples": 1}, ConfigError, "evaluate.num_samples", " 2"),
        (points(1), {}, DataError, "data.url", " 2 "),
        (Arrays(images().samples), {}, DataError, "evaluate.features", "labels"),
        (images(12), {}, DataError, "evaluate.features", " 20 "),
    ],
)
def test_metrics_that_cannot_be_computed_are_rejected_before_training(
    dataset, config, error, field, fact
):
    with refused(error, field) as caught:
        evaluator(dataset, **config)
    assert fact in str(caught.value)


def test_users_register_their_own_extractors():
    class Halved(Extractor):
        def __init__(self, dataset, comm):
            self.prepared = 0

        @property
        def num_features(self):
            return 2

        @property
        def protocol(self):
            return {"recipe": "halved"}

        def prepare(self):
            self.prepared += 1

        def __call__(self, samples):
            assert self.prepared == 1
            return samples / 2

    register_feature_extractor("halved")(Halved)
    with refused(PluginError, "evaluate.features"):
        register_feature_extractor("halved")(int)
    measured = evaluator(points(), features="halved")
    measured(fake_points)
    evaluation = measured(fake_points)
    assert evaluation.protocol["recipe"] == "halved"
    plain = evaluator(points())(fake_points).metrics["fid"]
    assert evaluation.metrics["fid"] == pytest.approx(plain / 4, rel=1e-6)
