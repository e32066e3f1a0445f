"""What a discriminator has learned of classes that nobody told it: a linear probe of its features.

Alain & Bengio 2017; of GANs, Radford et al. 2016. A linear classifier learns from few labelled
samples, once by the discriminator's features and once by the samples' own numbers, and is tested on
others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from gatdist.common.heartbeat import beat
from gatdist.data import Dataset

LABELS_A_CLASS = 10
MOST_TESTED = 2000
SEED = 0
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # of the regularization, inverse

Numbers = NDArray[np.float64]


def linear_probe(dataset: Dataset, features: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Accuracy, 0 to 1, on at most 2,000 samples, of logistic regression on 10 labels a class.

    Features are standardized; of five strengths of regularization the one that does best in a
    leave-some-out test among the labelled samples is taken.

    Args:
        dataset: labelled samples.
        features: samples as networks see them [n, …] → [n, k].
    """
    from sklearn.linear_model import LogisticRegressionCV  # takes long to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learned, tested = _split(dataset)
    seen = []
    for indices in (learned, tested):
        samples, labels = dataset.read(indices)
        assert labels is not None
        network_samples = dataset.sample_format.to_network(torch.from_numpy(samples)).float()
        with torch.no_grad():
            parts = []
            for part in network_samples.split(256):
                parts.append(features(part).flatten(1))
                beat()
            found = torch.cat(parts)
        seen.append((found.cpu().double().numpy(), labels))
    (x, y), (test_x, test_y) = seen
    regression = LogisticRegressionCV(Cs=_STRENGTHS, cv=5, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, and of what will change in scikit-learn
        classifier = make_pipeline(StandardScaler(), regression).fit(x, y)
        return float(classifier.score(test_x, test_y))


def _split(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the samples to learn from, 10 of each class where there are, and to test on."""
    order = np.random.default_rng(SEED).permutation(dataset.num_samples)
    most = LABELS_A_CLASS * dataset.num_classes * 20 + MOST_TESTED
    looked_at = order[:most]
    _, labels = dataset.read(looked_at)
    assert labels is not None
    rank = np.zeros(len(looked_at), dtype=np.int64)  # how many of its class came before
    for label in range(dataset.num_classes):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    is_learned = rank < LABELS_A_CLASS
    return looked_at[is_learned], looked_at[~is_learned][:MOST_TESTED]
