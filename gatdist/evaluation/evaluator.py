"""Measures a generator: its samples against all real ones, by a protocol told with the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gatdist.config import EvaluateConfig
from gatdist.data import Dataset, to_network, to_pixels
from gatdist.errors import ConfigError, DataError
from gatdist.evaluation import classifier as _registers_itself  # noqa: F401
from gatdist.evaluation.features import Extractor, extractors
from gatdist.evaluation.frechet import (
    HALVES_SEED,
    HALVES_SPLITS,
    GaussianSums,
    frechet_distance,
    halves_distance,
)
from gatdist.evaluation.kernel import cross_similarity, self_similarity
from gatdist.parallel.communicator import Communicator, LocalCommunicator
from gatdist.registry import Registry

Generate = Callable[[Tensor], Tensor]

_BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """What was measured, alike on all workers.

    Attributes:
        metrics: numbers by name.
        protocol: JSON values that say how they were measured. Numbers compare only where it is
            equal.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


@dataclass(frozen=True)
class FeatureSet:
    """The features of all samples of one side.

    Attributes:
        features: float32 [n, d], in the order of the samples, alike on all workers.
        sums: their sums, all-reduced.
        comm: the workers, who share the work of the metrics.
    """

    features: Tensor
    sums: GaussianSums
    comm: Communicator

    @cached_property
    def halves_distance(self) -> float | None:
        """See :func:`gatdist.evaluation.frechet.halves_distance`; None for fewer than 4 samples."""
        return halves_distance(self.features) if len(self.features) >= 4 else None

    @cached_property
    def self_similarity(self) -> float:
        """See :func:`gatdist.evaluation.kernel.self_similarity`."""
        return self_similarity(self.features, self.comm)


metrics: Registry[Callable[[FeatureSet, FeatureSet], dict[str, float]]] = Registry(
    "evaluate.metrics"
)


@metrics.register("fid")
def fid(real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    """Fréchet distance, the same between halves of the real data, and the first over the second."""
    distance, halves = frechet_distance(real.sums, fake.sums), real.halves_distance
    if not halves:
        return {"fid": distance}
    return {"fid": distance, "fid_halves": halves, "fid_over_halves": distance / halves}


@metrics.register("kid")
def kid(real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
    """Kernel distance."""
    across = cross_similarity(real.features, fake.features, real.comm)
    return {"kid": real.self_similarity + fake.self_similarity - 2 * across}


class Evaluator:
    """Built on all workers when a run starts, then called on all of them to measure.

    Building checks, and is quick; without metrics it checks nothing. The first call prepares the
    extractor and looks at the real data; what it learns of them is kept in memory for the next.

    Args:
        config: which metrics, of which features, on how many samples.
        dataset: the real samples.
        comm: the workers.
        device: where features are computed.
        exact: make the numbers the same, bit for bit, on any number of workers: each adds up all
            features by itself.

    Raises:
        ConfigError: a metric or extractor is not known, or there would be fewer than two samples.
        DataError: the extractor can't handle the data.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        dataset: Dataset,
        comm: Communicator,
        device: torch.device,
        *,
        exact: bool = False,
    ) -> None:
        self._metrics = {name: metrics[name] for name in config.metrics}
        self._dataset, self._comm, self._device = dataset, comm, device
        self._sharing = LocalCommunicator(device) if exact else comm
        self._num_samples = config.num_samples or dataset.num_samples
        # The default suits labelled pictures. Points are features as they are.
        fits = dataset.is_image or config.features != EvaluateConfig().features
        self._features = config.features if fits and self._metrics else "points"
        self._extractor: Extractor = extractors[self._features](dataset, comm)
        if self._metrics:
            self._require_samples()

    def __call__(self, generate: Generate) -> Evaluation:
        """Measure a generator.

        Args:
            generate: makes the samples with the numbers int64 [n] (on the worker's device), float
                [n, C, H, W] in [−1, 1] or points [n, k]. Sample i must not depend on what else is
                asked for. It is asked for numbers 0 to ``num_samples`` − 1 in all, each by one
                worker.

        Returns:
            Under the metrics' names, and ``class_share_min``, the rarest class's share, if the
            features know classes.
        """
        real = self._real  # first, since it prepares the extractor
        fake = self._feature_set(self._num_samples, generate)
        values = {
            key: value
            for metric in self._metrics.values()
            for key, value in metric(real, fake).items()
        }
        protocol = self._protocol()
        with torch.no_grad():
            classes = self._extractor.classify(fake.features)
        if classes is not None:
            histogram = torch.bincount(classes.cpu(), minlength=self._dataset.num_classes)
            values["class_share_min"] = int(histogram.min()) / self._num_samples
            protocol["class_histogram"] = histogram.tolist()
        return Evaluation(values, protocol)

    def _require_samples(self) -> None:
        if self._dataset.num_samples < 2:
            rule = "holds fewer than 2 samples, too few to compare with"
            raise DataError("data.url", rule, mend="Set evaluate.metrics = []")
        if self._num_samples < 2:
            raise ConfigError("evaluate.num_samples", "must be at least 2", value=self._num_samples)

    @cached_property
    def _real(self) -> FeatureSet:
        self._extractor.prepare()
        return self._feature_set(self._dataset.num_samples, self._read)

    def _read(self, positions: Tensor) -> Tensor:
        samples, _ = self._dataset.read(positions.cpu().numpy())
        return to_network(torch.from_numpy(samples).to(self._device))

    @torch.no_grad()
    def _feature_set(self, count: int, make: Generate) -> FeatureSet:
        """The features of samples 0 to ``count`` − 1.

        They are cut into the same chunks whoever computes them, so that a sample's features do not
        depend on the number of workers; worker r of W makes the chunks r, r + W and so on.
        """
        rank, world_size = self._comm.rank, self._comm.world_size
        num_chunks = -(-count // _BATCH)
        rows = -(-num_chunks // world_size)  # of the worker with the most, so that all gather alike
        mine = torch.zeros(rows, _BATCH, self._extractor.num_features, device=self._device)
        for row, chunk in enumerate(range(rank, num_chunks, world_size)):
            start, end = chunk * _BATCH, min(count, (chunk + 1) * _BATCH)
            samples = self._as_saved(make(torch.arange(start, end, device=self._device)))
            mine[row, : end - start] = self._extractor(samples.float())
        # [W, rows, chunk, d], worker first → [rows, W, chunk, d]: row i of worker r is chunk
        # i·W + r.
        features = self._comm.all_gather(mine).transpose(0, 1).reshape(-1, mine.shape[-1])
        features = features[:count].contiguous()
        share = features[self._sharing.rank :: self._sharing.world_size]
        sums = GaussianSums.of(share).reduced(self._sharing)
        return FeatureSet(features, sums, self._sharing)

    def _as_saved(self, samples: Tensor) -> Tensor:
        """Pictures as they would be read again from a file of 8 bits; points as they are."""
        return to_network(to_pixels(samples)) if self._dataset.is_image else samples

    def _protocol(self) -> dict[str, Any]:
        return {
            "features": self._features,
            **self._extractor.protocol,
            "data": self._dataset.fingerprint,
            "split": "all real",
            "num_real": self._dataset.num_samples,
            "num_generated": self._num_samples,
            "resize": "none",
            "rounding": "8 bits" if self._dataset.is_image else "none",
            "fid": "unbiased covariances, float64",
            "fid_halves": f"median of {HALVES_SPLITS} splits, seed {HALVES_SEED}",
            "kid": "unbiased, kernel (x·y/d + 1)³, all samples",
        }
