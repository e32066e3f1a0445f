"""Metrics by name: what each needs, and what it computes of real and generated samples.

Names that end in ``_real_split`` compare two random halves of the real samples, as a reference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.common.heartbeat import beat
from gatdist.common.registry import Registry
from gatdist.config import RunConfig
from gatdist.data.dataset import Dataset
from gatdist.data.sample_format import SampleFormat
from gatdist.evaluation import distances, neighbors, text
from gatdist.evaluation.distances import Gaussian, GaussianSums
from gatdist.models.layers import DiscriminatorFeatures
from gatdist.parallel.communicator import Communicator

_NGRAM_ORDERS = (1, 2, 3, 4)
_MAX_BLEU_TEXTS = 2000  # of one side
_SCORE_SPLITS, _SCORE_SEED = 10, 0  # of the Inception score
_MIN_CLASS_SAMPLES = 10  # of a class, real and generated, to compare them

# Of the probe: labelled samples per class, tested samples, seed of the split, and inverse strengths
# of the regularization.
_PROBE_LABELS, _PROBE_TESTED, _PROBE_SEED = 10, 2000, 0
_PROBE_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class SampleSet:
    """All real or all generated samples, identical on every worker."""

    # float32 [n, d], in the order of the samples; d = 0 if no metric needs them, n = 0 if only the
    # statistics of real samples are known.
    features: Tensor
    fit: GaussianSums | Gaussian  # of the features of all samples
    comm: Communicator  # the workers, who share the work of the metrics
    scores: Tensor | None = None  # of generated samples: logits of the features' classes [n, K]
    labels: Tensor | None = None  # classes of real samples, or to generate, int64 [n]
    texts: Sequence[str] = ()  # the samples, if they are text
    dataset: Dataset | None = None  # of real samples
    discriminator: nn.Module | None = None  # of generated samples
    # Of generated samples and their targets: values of each pair by name, float64 [n].
    pairs: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def split_frechet(self) -> float | None:
        return distances.split_half_distance(self.features) if len(self.features) >= 4 else None

    @cached_property
    def self_similarity(self) -> float:
        return distances.self_similarity(self.features, self.comm)

    @cached_property
    def split_sliced(self) -> float:
        halves = distances.random_halves(len(self.features))
        first, second = (self.features[half] for half in halves)
        return distances.sliced_wasserstein(first, second, self.comm)

    @cached_property
    def split_divergence(self) -> float:
        halves = distances.random_halves(len(self.texts))
        first, second = ([self.texts[i] for i in half] for half in halves)
        return text.ngram_divergence(first, second, _NGRAM_ORDERS[-1])

    @cached_property
    def self_bleu(self) -> float:
        return text.self_bleu(self.texts[:_MAX_BLEU_TEXTS])

    @cached_property
    def probe_raw(self) -> float:
        assert self.dataset is not None
        return linear_probe(self.dataset, lambda samples: samples.flatten(1))


# ``classes`` are those of the features, ``labels`` those that samples were generated for,
# ``real_samples`` more of the real data than the mean and covariance of their features, and
# ``pairs`` the target of each generated sample.
Need = Literal["features", "classes", "labels", "texts", "discriminator", "real_samples", "pairs"]
Measure = Callable[[SampleSet, SampleSet], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A function (real, fake) → values by name, identical on every worker, and what it needs.

    Attributes:
        protocol: By name, how values are computed.
        is_ranked: Whether one of the values has the metric's name, and compares generators.
        higher_is_better: Of that value.
        modalities: Of the samples it compares; (): of all.
        unsuitable: Returns why a format of samples does not suit it, or "".
    """

    measure: Measure
    needs: frozenset[Need]
    protocol: Mapping[str, str] = field(default_factory=dict)
    is_ranked: bool = True
    higher_is_better: bool = False
    modalities: tuple[str, ...] = ()
    unsuitable: Callable[[SampleFormat], str] = lambda sample_format: ""


metrics: Registry[Metric] = Registry("evaluate.metrics")


def higher_is_better(run: RunConfig) -> dict[str, bool]:
    """Return whether higher is better of each metric that ranks checkpoints, by its key.

    Raises:
        ConfigError: A metric has no value of its own name.
    """
    used = {"run.best_metric": run.best_metric} if run.keep_best_checkpoints else {}
    if run.convergence is not None:
        used["run.convergence.metric"] = run.convergence.metric
    ranked = [name for name in metrics.names() if metrics[name].is_ranked]
    for key, name in used.items():
        if not metrics[name].is_ranked:
            hint = f"Use one of {', '.join(ranked)}"
            raise ConfigError(key, "has several values, and ranks nothing", value=name, hint=hint)
    return {key: metrics[name].higher_is_better for key, name in used.items()}


def _metric(
    name: str, *needs: Need, ranked: bool = True, higher: bool = False, **protocol: str
) -> Callable[[Measure], Measure]:
    def add(measure: Measure) -> Measure:
        found = Metric(
            measure, frozenset(needs), protocol, is_ranked=ranked, higher_is_better=higher
        )
        metrics.register(name)(found)
        return measure

    return add


@_metric(
    "fid",
    "features",
    fid="unbiased covariances, float64",
    fid_real_split=f"median of {distances.NUM_SPLITS} splits, seed {distances.SPLIT_SEED}",
)
def fid(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Fréchet distance to all real samples (Heusel et al. 2017), with a real-vs-real reference.

    ``fid_real_split`` is the FID between two halves of the real samples, ``fid_over_real_split``
    the ratio of both. The ratio can be below 1: the bias of the FID falls with the number of
    samples, and the halves are smaller than the sets that ``fid`` compares.
    """
    distance, split = distances.frechet_distance(real.fit, fake.fit), real.split_frechet
    if not split:
        return {"fid": distance}
    return {"fid": distance, "fid_real_split": split, "fid_over_real_split": distance / split}


@_metric(
    "fid_per_class",
    "features",
    "labels",
    "real_samples",
    fid_per_class=f"classes with at least {_MIN_CLASS_SAMPLES} real and generated samples",
)
def fid_per_class(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """FID within each class (intra-FID, Miyato & Koyama 2018): mean, largest, and by class.

    ``fid_class_3`` is that of class 3. Classes with fewer than 10 samples, real or generated, are
    skipped; NaN if all are.
    """
    assert real.dataset is not None
    assert real.labels is not None
    assert fake.labels is not None
    num_classes, comm = real.dataset.num_classes, real.comm
    sides = (real.features, real.labels), (fake.features, fake.labels)
    counts = [torch.bincount(labels.cpu(), minlength=num_classes) for _, labels in sides]
    measured = (torch.minimum(*counts) >= _MIN_CLASS_SAMPLES).nonzero()[:, 0].tolist()
    mine = real.features.new_zeros(num_classes, dtype=torch.float64)
    for label in measured[comm.rank :: comm.world_size]:
        fits = (GaussianSums.of(features[labels == label]) for features, labels in sides)
        mine[label] = distances.frechet_distance(*fits)
        beat()
    values = comm.all_reduce_(mine)[measured]
    by_class = zip(measured, values.tolist(), strict=True)
    return {
        "fid_per_class": float(values.mean()),
        "fid_per_class_max": float(values.max()) if measured else math.nan,
        **{f"fid_class_{label}": value for label, value in by_class},
    }


@_metric("kid", "features", "real_samples", kid="unbiased, kernel (x·y/d + 1)³, all samples")
def kid(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Unbiased kernel distance of features (Bińkowski et al. 2018)."""
    across = distances.cross_similarity(real.features, fake.features, real.comm)
    return {"kid": real.self_similarity + fake.self_similarity - 2 * across}


@_metric(
    "swd",
    "features",
    "real_samples",
    swd=f"{distances.NUM_DIRECTIONS} directions, seed {distances.DIRECTIONS_SEED}",
)
def swd(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Sliced Wasserstein distance (Bonneel et al. 2015); of ``points``, it needs no network."""
    distance = distances.sliced_wasserstein(real.features, fake.features, real.comm)
    return {"swd": distance, "swd_real_split": real.split_sliced}


@_metric(
    "precision_recall",
    "features",
    "real_samples",
    ranked=False,
    precision_recall=f"{neighbors.PRECISION_NEIGHBORS} neighbours",
)
def precision_recall(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Precision (sample quality) and recall (coverage of the data) of Kynkäänniemi et al. 2019."""
    precision, recall = neighbors.precision_and_recall(real.features, fake.features, real.comm)
    return {"precision": precision, "recall": recall}


@_metric(
    "density_coverage",
    "features",
    "real_samples",
    ranked=False,
    density_coverage=f"{neighbors.DENSITY_NEIGHBORS} neighbours",
)
def density_coverage(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020): as ``precision_recall``, robust to outliers."""
    density, coverage = neighbors.density_and_coverage(real.features, fake.features, real.comm)
    return {"density": density, "coverage": coverage}


@_metric(
    "inception_score",
    "classes",
    higher=True,
    inception_score=f"{_SCORE_SPLITS} splits, seed {_SCORE_SEED}",
)
def inception_score(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """exp(mean KL(p(y|x) ‖ p(y))) (Salimans et al. 2016): 1 to the number of classes.

    Mean over 10 random splits of the samples, and ``inception_score_std``, the standard deviation.
    """
    assert fake.scores is not None
    count = len(fake.scores)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SCORE_SEED))
    scores = []
    for split in order.to(fake.scores.device).tensor_split(min(_SCORE_SPLITS, count)):
        given = fake.scores[split].double().log_softmax(dim=1)
        overall = given.exp().mean(dim=0)
        divergence = (given.exp() * given).sum(dim=1).mean() - torch.xlogy(overall, overall).sum()
        scores.append(divergence.exp())
        beat()
    found = torch.stack(scores)
    deviation = found.std(correction=0)
    return {"inception_score": float(found.mean()), "inception_score_std": float(deviation)}


@_metric("modes", "classes", higher=True)
def modes(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Number of classes that at least one generated sample is classified as."""
    return {"modes": float((_class_counts(fake) > 0).sum())}


@_metric("kl", "classes")
def kl(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """KL(q ‖ uniform) in nats, of the shares q of classes among generated samples.

    0 to the logarithm of the number of classes. With ``modes``, the measure of mode coverage on
    Stacked MNIST (Metz et al. 2017), whose 1,000 classes are equally likely.
    """
    counts = _class_counts(fake).double()
    shares = counts / counts.sum()
    return {"kl": float(torch.xlogy(shares, shares * len(shares)).sum())}


def _class_counts(samples: SampleSet) -> Tensor:
    assert samples.scores is not None
    found = samples.scores.argmax(dim=1).cpu()  # CUDA's bincount is not deterministic
    return torch.bincount(found, minlength=samples.scores.shape[1])


@_metric("label_accuracy", "classes", "labels", higher=True)
def label_accuracy(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Share of generated samples that are classified as the class they were generated for."""
    assert fake.scores is not None
    assert fake.labels is not None
    right = fake.scores.argmax(dim=1) == fake.labels
    return {"label_accuracy": float(right.double().mean())}


@_metric("probe", "discriminator", "real_samples", higher=True)
def probe(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Accuracy of a linear probe of the discriminator's features, and of raw samples.

    It learns from 10 labels per class (Alain & Bengio 2017; of GANs, Radford et al. 2016).
    """
    assert real.dataset is not None
    assert fake.discriminator is not None
    features = DiscriminatorFeatures(fake.discriminator)
    like = next(features.parameters())
    accuracy = linear_probe(real.dataset, lambda samples: features(samples.to(like)))
    features.close()
    return {"probe": accuracy, "probe_raw": real.probe_raw}


@_metric("jsd", "texts", "real_samples", jsd="characters, with beginning and end, bits")
def jsd(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Jensen–Shannon divergence of the distributions of character n-grams, in bits.

    ``jsd`` is that of 4-grams, ``jsd_1`` to ``jsd_3`` those of shorter ones.
    """
    found = [text.ngram_divergence(real.texts, fake.texts, n) for n in _NGRAM_ORDERS]
    short = {f"jsd_{n}": found[n - 1] for n in _NGRAM_ORDERS[:-1]}
    return short | {"jsd": found[-1], "jsd_real_split": real.split_divergence}


@_metric(
    "self_bleu",
    "texts",
    "real_samples",
    self_bleu="characters up to 4-grams, smoothed by ½, 500 of 2,000 texts",
)
def self_bleu(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Similarity of generated texts to one another (Zhu et al. 2018), and of real texts."""
    return {"self_bleu": fake.self_bleu, "self_bleu_real": real.self_bleu}


@_metric("novelty", "texts", "real_samples", ranked=False)
def novelty(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Shares of generated texts that are copies of real ones, new and well-formed, and distinct."""
    return text.novelty(real.texts, fake.texts)


def linear_probe(dataset: Dataset, features: Callable[[Tensor], Tensor]) -> float:
    """Return the accuracy, 0 to 1, of logistic regression on 10 labels per class.

    On at most 2,000 other samples. ``features`` maps samples as networks see them [n, …] → [n, k].
    They are standardized; 5-fold cross-validation chooses the strength of the regularization.
    """
    from sklearn.linear_model import LogisticRegressionCV  # takes long to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = []
    for indices in _probe_split(dataset):
        samples, labels = dataset.read(indices)
        network_samples = dataset.sample_format.to_network(torch.from_numpy(samples)).float()
        with torch.no_grad():
            parts = []
            for part in network_samples.split(256):
                parts.append(features(part).flatten(1))
                beat()
        sets.append((torch.cat(parts).cpu().double().numpy(), labels))
    training, test = sets
    regression = LogisticRegressionCV(Cs=_PROBE_STRENGTHS, cv=5, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, and of changes in scikit-learn
        classifier = make_pipeline(StandardScaler(), regression).fit(*training)
        return float(classifier.score(*test))


def _probe_split(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices of the samples to learn from, 10 per class where there are, and to test on."""
    order = np.random.default_rng(_PROBE_SEED).permutation(dataset.num_samples)
    candidates = order[: _PROBE_LABELS * dataset.num_classes * 20 + _PROBE_TESTED]
    _, labels = dataset.read(candidates)
    assert labels is not None
    rank = np.zeros(len(candidates), dtype=np.int64)  # number of earlier samples of the same class
    for label in range(dataset.num_classes):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    is_learned = rank < _PROBE_LABELS
    return candidates[is_learned], candidates[~is_learned][:_PROBE_TESTED]
