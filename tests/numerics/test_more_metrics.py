"""Metrics beyond FID and KID: closed forms, definitions, and equality over workers."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from arrays import ALONE, Arrays, evaluator, fake_images, fake_points, images, points, texts
from gatdist.common.errors import ConfigError
from gatdist.evaluation import (
    Extractor,
    classifier,
    neighbors,
    register_feature_extractor,
)
from gatdist.evaluation.distances import GaussianSums, frechet_distance, sliced_wasserstein
from gatdist.evaluation.neighbors import density_and_coverage, precision_and_recall, radii
from gatdist.evaluation.text import ngram_divergence, ngrams, novelty, self_bleu
from support import refused, spawn


def normal(n, d, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(n, d, generator=generator, dtype=torch.float64)


def _copies():
    x = normal(40, 8)
    return x[torch.arange(200) % 40], x[torch.arange(150) % 37]


def _far_outlier():
    x = normal(200, 16)
    x[7] *= 1e6
    return x, normal(150, 16, seed=1)


# Real and generated samples whose distances float32 can hardly distinguish.
SETS = {
    "normal": lambda: (normal(200, 32), normal(150, 32, seed=1)),
    "copies": _copies,
    "grid": lambda: (normal(200, 2).mul(2).round(), normal(150, 2, seed=1).mul(2).round()),
    "far from 0": lambda: (normal(200, 16) + 1e4, normal(150, 16, seed=1) + 1e4),
    "an outlier": _far_outlier,
    "two clusters": lambda: (
        normal(200, 16, mean=0.0) + 1e3 * (torch.arange(200) % 2)[:, None],
        normal(150, 16, seed=1) + 1e3 * (torch.arange(150) % 2)[:, None],
    ),
    "tiny": lambda: (normal(200, 4) * 1e-30, normal(150, 4, seed=1) * 1e-30),
    "huge": lambda: (normal(200, 4) * 1e30, normal(150, 4, seed=1) * 1e30),
    "equal": lambda: (torch.ones(20, 3), torch.ones(15, 3)),
}


class TestNeighbours:
    def test_radius_is_the_distance_of_the_kth_other_sample(self):
        x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        assert radii(x, 1, ALONE).tolist() == [1, 1, 2, 4]
        assert radii(x, 2, ALONE).tolist() == [3, 2, 3, 6]
        assert radii(x, 9, ALONE).tolist() == [7, 6, 4, 7]

    def test_identical_sets_have_full_and_distant_ones_zero_scores(self):
        x = normal(60, 4)
        assert precision_and_recall(x, x, ALONE) == (1, 1)
        assert precision_and_recall(x, x + 100, ALONE) == (0, 0)
        assert density_and_coverage(x, x + 100, ALONE) == (0, 0)
        density, coverage = density_and_coverage(x, x, ALONE)
        # Each of n samples is in its own ball, and in those whose k nearest it is among.
        assert density == pytest.approx(1 + 1 / 5)
        assert coverage == 1

    def test_missing_samples_reduce_recall_and_wrong_ones_precision(self):
        left, right = normal(200, 2), normal(200, 2, seed=1, mean=50)
        both = torch.cat([left, right])
        half = precision_and_recall(both, normal(200, 2, seed=2), ALONE)
        assert half[0] > 0.9
        assert half[1] == pytest.approx(0.5, abs=0.06)
        wrong = precision_and_recall(left, both[:, [0, 1]], ALONE)
        assert wrong[0] == pytest.approx(0.5, abs=0.06)
        assert wrong[1] > 0.9

    def test_coverage_of_independent_samples_equals_naeem_et_al(self):
        # 1 − Π (m−i)/(n+m−i), i = 1 … k, with n fakes and m real samples (lemma 2).
        n, m, k = 300, 200, 5
        found = [
            density_and_coverage(normal(m, 3, s), normal(n, 3, s + 99), ALONE) for s in range(20)
        ]
        expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
        density, coverage = np.mean(found, axis=0)
        assert coverage == pytest.approx(expected, abs=0.01)
        assert density == pytest.approx(1, abs=0.05)

    def test_scores_equal_those_of_scikit_learns_neighbours(self):
        from sklearn.neighbors import NearestNeighbors

        real, fake = normal(150, 6), normal(120, 6, seed=1) * 0.8 + 0.3

        def ball_radii(x, k):
            return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1]

        def inside(x, centres, k):  # [x, centres]
            nearest = NearestNeighbors(n_neighbors=len(centres)).fit(centres)
            distances, order = nearest.kneighbors(x)
            found = np.empty_like(distances)
            np.put_along_axis(found, order, distances, axis=1)
            return found <= ball_radii(centres, k)

        precision, recall = inside(fake, real, 3).any(1), inside(real, fake, 3).any(1)
        assert precision_and_recall(real, fake, ALONE) == (precision.mean(), recall.mean())
        held = inside(fake, real, 5)
        density, coverage = density_and_coverage(real, fake, ALONE)
        assert density == pytest.approx(held.sum() / (5 * len(fake)))
        assert coverage == held.any(0).mean()

    def test_matrix_in_blocks_equals_the_whole(self, monkeypatch):
        x, y = normal(50, 3), normal(40, 3, seed=1)
        whole = precision_and_recall(x, y, ALONE), density_and_coverage(x, y, ALONE)
        monkeypatch.setattr("gatdist.evaluation.neighbors._MAX_ENTRIES", 77)
        assert (precision_and_recall(x, y, ALONE), density_and_coverage(x, y, ALONE)) == whole

    @pytest.mark.parametrize("name", SETS)
    @pytest.mark.parametrize("few", [0, 16])
    def test_results_are_those_of_float64_differences(self, name, few, monkeypatch):
        """Products in float32 save time and decide nothing that they do not know."""
        monkeypatch.setattr("gatdist.evaluation.neighbors._FEW_FEATURES", few)
        x, y = (side.float() for side in SETS[name]())
        monkeypatch.setattr("gatdist.evaluation.neighbors._MAX_ENTRIES", 5000)
        exact = torch.cdist(*([x.double()] * 2), compute_mode="donot_use_mm_for_euclid_dist")
        across = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for k in (1, 3, 5):
            expected = exact.topk(k + 1, dim=1, largest=False).values[:, k]
            assert radii(x, k, ALONE).equal(expected)
        inside = across <= radii(x, 5, ALONE)[:, None]
        density, coverage = density_and_coverage(x, y, ALONE)
        assert density == float(inside.double().sum()) / (5 * len(y))
        assert coverage == float(inside.any(dim=1).double().mean())

    def test_most_distances_are_only_bounded(self, monkeypatch):
        computed = []

        def count(x, y):
            computed.append(x.shape[-2] * y.shape[-2] * math.prod(x.shape[:-2]))
            return distances(x, y)

        distances = neighbors._distances
        monkeypatch.setattr(neighbors, "_distances", count)
        x, y = normal(600, 64).float(), normal(600, 64, seed=1).float()
        precision_and_recall(x, y, ALONE)
        assert sum(computed) < 0.03 * 4 * 600 * 600


class TestSliced:
    def test_shift_is_measured_by_its_projections(self):
        # The mean of (v·shift)² over directions v on the sphere is ‖shift‖²/d.
        x, shift = normal(500, 8), torch.full((8,), 3.0, dtype=torch.float64)
        expected = float(shift.norm()) / math.sqrt(8)
        assert sliced_wasserstein(x, x + shift, ALONE) == pytest.approx(expected, rel=0.1)

    def test_in_one_dimension_it_is_the_distance_of_sorted_numbers(self):
        x, y = normal(99, 1), normal(99, 1, seed=1) * 2
        expected = (x.sort(dim=0).values - y.sort(dim=0).values).square().mean().sqrt()
        assert sliced_wasserstein(x, y, ALONE) == pytest.approx(float(expected), rel=1e-9)

    def test_distance_to_itself_is_0_for_any_order_and_size(self):
        x = normal(100, 4)
        assert sliced_wasserstein(x, x.flip(0), ALONE) == 0
        assert sliced_wasserstein(x, x.repeat_interleave(3, dim=0), ALONE) == 0


class TestTexts:
    def test_ngrams_include_start_and_end(self):
        assert ngrams("abc", 1) == ["a", "b", "c"]
        assert ngrams("ab", 2) == ["\x02a", "ab", "b\x03"]
        assert ngrams("", 2) == ["\x02\x03"]
        assert ngrams("a", 4) == []

    def test_divergence_is_0_to_itself_and_1_without_common_ngrams(self):
        assert ngram_divergence(["abc", "d"], ["d", "abc"], 2) == 0
        assert ngram_divergence(["aa"], ["bb"], 1) == pytest.approx(1)
        assert ngram_divergence(["aa"], [""], 1) == 1

    def test_divergence_is_the_square_of_scipys_distance(self):
        from collections import Counter

        from scipy.spatial.distance import jensenshannon

        sides = ["the cat sat", "on the mat"], ["a dog", "the log", "sat"]
        for n in (1, 2, 3):
            counts = [Counter(gram for text in side for gram in ngrams(text, n)) for side in sides]
            grams = sorted(counts[0] | counts[1])
            p, q = ([count[gram] for gram in grams] for count in counts)
            assert ngram_divergence(*sides, n) == pytest.approx(jensenshannon(p, q, 2) ** 2)

    def test_divergence_of_two_coins(self):
        def entropy(p):
            return -sum(x * math.log2(x) for x in (p, 1 - p) if x)

        # JS = H((p + q)/2) − (H(p) + H(q))/2
        expected = entropy(0.5) - (entropy(0.25) + entropy(0.75)) / 2
        assert ngram_divergence(["abbb"], ["aaab"], 1) == pytest.approx(expected)

    def test_self_bleu_of_copies_is_1_and_of_unrelated_lines_low(self):
        assert self_bleu(["hello"] * 3) == pytest.approx(1)
        assert self_bleu(["abcde", "fghij", "klmno"]) < 0.15
        assert self_bleu(["one"]) == 0

    def test_self_bleu_equals_its_definition(self):
        from collections import Counter

        lines = ["abcab", "abcd", "bcabc", "xabc", "cab"]

        def bleu(line, others):
            logs = 0
            for n in range(1, 5):
                count = Counter(ngrams(line, n))
                best = Counter()
                for other in others:
                    best |= Counter(ngrams(other, n))
                matches = sum(min(k, best[gram]) for gram, k in count.items())
                logs += math.log(max(matches, 0.5) / count.total()) / 4
            closest = min(map(len, others), key=lambda length: (abs(length - len(line)), length))
            return math.exp(min(0, 1 - closest / len(line)) + logs)

        expected = [bleu(line, lines[:i] + lines[i + 1 :]) for i, line in enumerate(lines)]
        assert self_bleu(lines) == pytest.approx(sum(expected) / len(lines))

    def test_novelty_distinguishes_copies_from_new_texts(self):
        real = ["banana", "bandana", "cabana"]
        fakes = ["banana", "cabandana", "nab", "banana"]
        assert novelty(real, fakes) == {
            "copies": 0.5,
            "novel_well_formed": 0.25,
            "distinct": 0.75,
        }


class FirstPixelClassifier(Extractor):
    """Reads an image's class from its first pixel, with certainty."""

    def __init__(self, dataset, comm):
        self._dataset = dataset

    num_features = 1

    @property
    def num_classes(self):
        return self._dataset.num_classes

    def __call__(self, samples):
        return samples[:, 0, 0, :1]

    def classify(self, features):
        classes = torch.arange(self.num_classes)
        return -1e4 * (features - (classes / self.num_classes * 2 - 1)).abs()


register_feature_extractor("first-pixel")(FirstPixelClassifier)


def constant(classes, labels=None):
    """Return a generator of images of these classes, made for these labels."""
    level = classes.float() / int(classes.max() + 1) * 2 - 1

    def generate(positions):
        return level[positions][:, None, None, None].expand(-1, 3, 6, 9)

    generate.labels = lambda positions: None if labels is None else labels[positions]
    return generate


class TestClasses:
    data = images(100, classes=5)

    def measured(self, *metrics, generate, **more):
        asked = {"metrics": list(metrics), "features": "first-pixel"}
        return evaluator(self.data, **asked, **more)(generate).metrics

    def test_inception_score_of_balanced_one_hots_is_their_number(self):
        balanced = constant(torch.arange(1000) % 5)
        metrics = self.measured("inception_score", generate=balanced, num_samples=1000)
        # A split of m samples has lost exp((5 − 1)/2m) by chance.
        assert metrics["inception_score"] == pytest.approx(5 * math.exp(-4 / 200), abs=0.05)
        assert metrics["class_share_min"] == 0.2

    def test_modes_are_counted(self):
        classes = torch.tensor([0, 2, 4]).repeat(34)
        assert self.measured("modes", generate=constant(classes))["modes"] == 3

    def test_label_accuracy_is_the_recognized_share(self):
        classes = torch.arange(100) % 5
        labels = classes.clone()
        labels[:25] = (labels[:25] + 1) % 5
        found = self.measured(
            "label_accuracy", generate=constant(classes, labels), conditional=True
        )
        assert found["label_accuracy"] == 0.75


def measure(comm):
    """Return one worker's metrics, with counts that no world size divides."""
    names = ["swd", "precision_recall", "density_coverage"]
    of_points = evaluator(points(401), comm, metrics=names, num_samples=307)(fake_points)
    classifier._NUM_STEPS = 3
    names = ["inception_score", "modes"]
    of_images = evaluator(images(101), comm, metrics=names, num_samples=97)(fake_images)
    lines = ["".join(word) for word in itertools.product("abc", repeat=4)]
    data = texts(*lines)
    seen = data.sample_format.to_network(torch.from_numpy(data.samples)).flip(0)
    names = ["jsd", "self_bleu", "novelty"]
    of_texts = evaluator(data, comm, metrics=names, num_samples=59)(lambda at: seen[at])
    return [e.metrics for e in (of_points, of_images, of_texts)]


def test_any_number_of_workers_gives_the_same_metrics(monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "_NUM_STEPS", 3)
    alone = measure(ALONE)
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path))
    by_rank = spawn(3, measure)
    assert all(result == by_rank[0] for result in by_rank)
    assert by_rank[0][0] == pytest.approx(alone[0], rel=1e-9)
    assert by_rank[0][1] == pytest.approx(alone[1], rel=1e-3)
    assert by_rank[0][2] == alone[2]


def clips(n=60, length=2000, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    t = np.arange(length) / 8000
    tones = np.sin(2 * np.pi * t * (300.0 * 2 ** labels[:, None])) * 0.5
    clips = (tones + 0.01 * rng.normal(size=(n, length))).astype(np.float32)
    return Arrays(clips[:, None], labels.astype(np.int64))


class TestAudio:
    def test_log_mel_statistics_distinguish_tones(self):
        data = clips()
        real = torch.from_numpy(data.samples)
        asked = evaluator(data, metrics=["fid"], features="log_mel")
        same = asked(lambda positions: real[positions])
        quieter = asked(lambda positions: real[positions] * 0.05)
        assert same.metrics["fid"] == pytest.approx(0, abs=1e-6)
        assert quieter.metrics["fid"] > 5 * same.metrics["fid_real_split"]
        assert same.protocol["log_mel"] == {"bands": 64, "window": 256, "hop": 64}
        assert same.protocol["rounding"] == "16 bits"

    def test_classifier_recognizes_tones(self, monkeypatch):
        monkeypatch.setattr(classifier, "_NUM_STEPS", 60)
        data = clips()
        real = torch.from_numpy(data.samples)
        asked = evaluator(data, metrics=["inception_score"], num_samples=600)
        found = asked(lambda positions: real[positions % 60])
        assert found.metrics["inception_score"] == pytest.approx(3, abs=0.2)

    def test_images_have_no_log_mel_statistics(self):
        with refused(Exception, "evaluate.features"):
            evaluator(images(), features="log_mel")


@pytest.mark.parametrize(
    ("data", "metrics"),
    [
        (points(), ["jsd"]),  # compares texts
        (points(), ["modes"]),  # requires classes that the features predict
        (images(), ["label_accuracy"]),  # requires a conditional generator
        (points(), ["probe"]),  # requires labels
    ],
)
def test_metric_with_missing_requirements_is_rejected(data, metrics):
    with refused(ConfigError, "evaluate.metrics"):
        evaluator(data, metrics=metrics)


class Means(torch.nn.Module):
    """The interface of the published Inception: pixels of three channels, features on request."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.to(torch.float32).mean(dim=[2, 3])
        return means if return_features else means.sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("features") / "means.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Means()).save(str(file))
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


class TestTorchScript:
    def asked(self, data, file, digest):
        return evaluator(
            data,
            metrics=["fid"],
            features="torchscript",
            features_file=str(file),
            features_sha256=digest,
        )

    def test_features_are_those_of_the_file(self, network_file):
        data = images(100)
        evaluation = self.asked(data, *network_file)(fake_images)
        real = torch.from_numpy(data.samples).float().mean(dim=(1, 2))
        fake = (
            data.sample_format.to_samples(fake_images(torch.arange(100))).float().mean(dim=(1, 2))
        )
        expected = frechet_distance(GaussianSums.of(real), GaussianSums.of(fake))
        assert evaluation.metrics["fid"] == pytest.approx(expected, rel=1e-5)
        assert evaluation.protocol["features_digest"] == network_file[1]

    def test_gray_images_are_passed_as_three_channels(self, network_file):
        gray = images(60, shape=(6, 9, 1))
        made = self.asked(gray, *network_file)(
            lambda positions: torch.zeros(len(positions), 1, 6, 9)
        )
        assert math.isfinite(made.metrics["fid"])

    def test_other_digest_is_rejected(self, network_file):
        file, _ = network_file
        with refused(ConfigError, "evaluate.features_sha256"):
            self.asked(images(), file, "0" * 64)

    def test_file_that_is_no_torchscript_is_rejected(self, tmp_path):
        (tmp_path / "x").write_bytes(b"no network")
        digest = hashlib.sha256(b"no network").hexdigest()
        with refused(ConfigError, "evaluate.features_file"):
            self.asked(images(), tmp_path / "x", digest)

    def test_file_must_be_given(self):
        with refused(ConfigError, "evaluate.features_file"):
            self.asked(images(), "", "")
