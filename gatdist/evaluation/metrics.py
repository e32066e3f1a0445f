"""The metrics, by name: what each looks at, and what it makes of real and fake samples.

| name | says | reported as |
| --- | --- | --- |
| ``fid`` | Fréchet distance (Heusel et al. 2017) | ``fid, fid_real_split`` and their ratio |
| ``kid`` | kernel distance of features (Bińkowski et al. 2018) | ``kid`` |
| ``swd`` | sliced Wasserstein distance (Bonneel et al. 2015) | ``swd, swd_real_split`` |
| ``precision_recall`` | Kynkäänniemi et al. 2019 | ``precision, recall`` |
| ``density_coverage`` | Naeem et al. 2020 | ``density, coverage`` |
| ``inception_score`` | of the features' classes (Salimans et al. 2016) | ``inception_score`` |
| ``modes`` | how many classes the fakes have | ``modes`` |
| ``label_accuracy`` | share of fakes recognized as what they were to be | ``label_accuracy`` |
| ``jsd`` | divergence of 1- to 4-grams of texts | ``jsd_1, jsd_2, jsd_3, jsd, jsd_real_split`` |
| ``self_bleu`` | how alike texts are | ``self_bleu, self_bleu_real`` |
| ``probe`` | what the discriminator's features tell of classes | ``probe, probe_raw`` |
| ``novelty`` | texts that are new and well-formed | ``copies, novel_well_formed, distinct`` |

What ends in ``_real_split`` compares two halves of the real samples, as good as a generator can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from gatdist.common.registry import Registry
from gatdist.data import Dataset
from gatdist.evaluation import neighbors, text
from gatdist.evaluation.frechet import (
    GaussianSums,
    frechet_distance,
    halves_distance,
    random_halves,
)
from gatdist.evaluation.kernel import cross_similarity, self_similarity
from gatdist.evaluation.probe import linear_probe
from gatdist.evaluation.sliced import sliced_wasserstein
from gatdist.models.layers import DiscriminatorFeatures
from gatdist.parallel.communicator import Communicator

_NGRAM_ORDERS = (1, 2, 3, 4)
_MOST_ALIKE = 2000  # texts of one side that self-BLEU compares


@dataclass(frozen=True)
class SampleSet:
    """All samples of one side, alike on all workers.

    Attributes:
        features: float32 [n, d], in the order of the samples; d is 0 where nobody asks for them.
        sums: their sums, all-reduced.
        comm: the workers, who share the work of the metrics.
        scores: logits of the features' classes [n, K]; None where they know none.
        labels: the classes that the samples are to be of, int64 [n]; None where there are none.
        texts: the samples as strings; None where they are no texts.
        dataset: where real samples are from.
        discriminator: that fakes were made against.
    """

    features: Tensor
    sums: GaussianSums
    comm: Communicator
    scores: Tensor | None = None
    labels: Tensor | None = None
    texts: Sequence[str] | None = None
    dataset: Dataset | None = None
    discriminator: nn.Module | None = None

    @cached_property
    def halves_distance(self) -> float | None:
        """See :func:`gatdist.evaluation.frechet.halves_distance`; None for fewer than 4 samples."""
        return halves_distance(self.features) if len(self.features) >= 4 else None

    @cached_property
    def self_similarity(self) -> float:
        """See :func:`gatdist.evaluation.kernel.self_similarity`."""
        return self_similarity(self.features, self.comm)

    @cached_property
    def halves_sliced(self) -> float:
        """Sliced Wasserstein distance between two random halves."""
        first, second = (self.features[half] for half in random_halves(len(self.features)))
        return sliced_wasserstein(first, second, self.comm)

    @cached_property
    def halves_divergence(self) -> float:
        """Divergence of 4-grams between two random halves."""
        known = self.texts
        assert known is not None
        first, second = ([known[i] for i in half] for half in random_halves(len(known)))
        return text.ngram_divergence(first, second, _NGRAM_ORDERS[-1])

    @cached_property
    def self_bleu(self) -> float:
        """See :func:`gatdist.evaluation.text.self_bleu`; of the first 2,000 texts."""
        assert self.texts is not None
        return text.self_bleu(self.texts[:_MOST_ALIKE])

    @cached_property
    def probe_raw(self) -> float:
        """See :func:`gatdist.evaluation.probe.linear_probe`, by the samples' own numbers."""
        assert self.dataset is not None
        return linear_probe(self.dataset, lambda samples: samples.flatten(1))


Need = Literal["features", "classes", "labels", "texts", "discriminator"]
Measure = Callable[[SampleSet, SampleSet], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        measure: (real, fake) → numbers by name, alike on all workers.
        needs: what of the samples it looks at: ``features``, their ``classes``, the ``labels`` that
            fakes were made for, ``texts``, or the ``discriminator`` and labelled real samples.
    """

    measure: Measure
    needs: frozenset[Need]


metrics: Registry[Metric] = Registry("evaluate.metrics")


def _metric(name: str, *needs: Need) -> Callable[[Measure], Measure]:
    def add(measure: Measure) -> Measure:
        metrics.register(name)(Metric(measure, frozenset(needs)))
        return measure

    return add


@_metric("fid", "features")
def fid(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Fréchet distance, the same between halves of the real data, and the first over the second."""
    distance, halves = frechet_distance(real.sums, fake.sums), real.halves_distance
    if not halves:
        return {"fid": distance}
    return {"fid": distance, "fid_real_split": halves, "fid_over_real_split": distance / halves}


@_metric("kid", "features")
def kid(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Kernel distance."""
    across = cross_similarity(real.features, fake.features, real.comm)
    return {"kid": real.self_similarity + fake.self_similarity - 2 * across}


@_metric("swd", "features")
def swd(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Sliced Wasserstein distance. With ``evaluate.features = "points"`` it needs no network."""
    distance = sliced_wasserstein(real.features, fake.features, real.comm)
    return {"swd": distance, "swd_real_split": real.halves_sliced}


@_metric("precision_recall", "features")
def precision_recall(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """How many fakes could be real, and how many real samples could be fakes."""
    precision, recall = neighbors.precision_and_recall(real.features, fake.features, real.comm)
    return {"precision": precision, "recall": recall}


@_metric("density_coverage", "features")
def density_coverage(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """As ``precision_recall``, less sensitive to outliers."""
    density, coverage = neighbors.density_and_coverage(real.features, fake.features, real.comm)
    return {"density": density, "coverage": coverage}


@_metric("inception_score", "classes")
def inception_score(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Exp of the mean KL(p(y|x) ‖ p(y)), over all fakes at once: 1 to the number of classes."""
    assert fake.scores is not None
    given = fake.scores.double().log_softmax(dim=1)
    overall = given.exp().mean(dim=0)
    divergence = (given.exp() * given).sum(dim=1).mean() - torch.xlogy(overall, overall).sum()
    return {"inception_score": float(divergence.exp())}


@_metric("modes", "classes")
def modes(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """How many classes at least one fake is recognized as."""
    assert fake.scores is not None
    return {"modes": float(len(fake.scores.argmax(dim=1).unique()))}


@_metric("label_accuracy", "classes", "labels")
def label_accuracy(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """The share of fakes that are recognized as the class that they were made for."""
    assert fake.scores is not None
    assert fake.labels is not None
    right = fake.scores.argmax(dim=1) == fake.labels
    return {"label_accuracy": float(right.double().mean())}


@_metric("probe", "discriminator")
def probe(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Accuracy of a linear classifier that learns from 10 labels a class: by features, and raw."""
    assert real.dataset is not None
    assert fake.discriminator is not None
    features = DiscriminatorFeatures(fake.discriminator)
    like = next(features.parameters())
    accuracy = linear_probe(real.dataset, lambda samples: features(samples.to(like)))
    features.close()
    return {"probe": accuracy, "probe_raw": real.probe_raw}


@_metric("jsd", "texts")
def jsd(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Jensen–Shannon divergence of the distributions of n-grams of characters, in bits."""
    assert real.texts is not None
    assert fake.texts is not None
    found = [text.ngram_divergence(real.texts, fake.texts, n) for n in _NGRAM_ORDERS]
    short = {f"jsd_{n}": found[n - 1] for n in _NGRAM_ORDERS[:-1]}
    return short | {"jsd": found[-1], "jsd_real_split": real.halves_divergence}


@_metric("self_bleu", "texts")
def self_bleu(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """How alike fakes are, and how alike real texts are."""
    return {"self_bleu": fake.self_bleu, "self_bleu_real": real.self_bleu}


@_metric("novelty", "texts")
def novelty(real: SampleSet, fake: SampleSet) -> dict[str, float]:
    """Shares of fakes that are copies of real texts, or new and well-formed, or all different."""
    assert real.texts is not None
    assert fake.texts is not None
    return text.novelty(real.texts, fake.texts)
