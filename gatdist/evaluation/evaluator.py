"""Measures a generator: its samples against all real ones, by a protocol told with the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError, DataError
from gatdist.common.heartbeat import beat
from gatdist.config import EvaluateConfig
from gatdist.data import Dataset
from gatdist.data.sample_format import TextFormat
from gatdist.evaluation import classifier, from_file  # noqa: F401  (they register themselves)
from gatdist.evaluation.cache import RealFeatures
from gatdist.evaluation.features import Extractor, build_extractor
from gatdist.evaluation.frechet import HALVES_SEED, HALVES_SPLITS, GaussianSums
from gatdist.evaluation.metrics import Metric, SampleSet, metrics
from gatdist.evaluation.neighbors import DENSITY_NEIGHBORS, PRECISION_NEIGHBORS
from gatdist.evaluation.sliced import DIRECTIONS_SEED, NUM_DIRECTIONS
from gatdist.parallel.communicator import Communicator, LocalCommunicator

_BATCH = 256
_HOW: Mapping[str, str] = {
    "fid": "unbiased covariances, float64",
    "fid_real_split": f"median of {HALVES_SPLITS} splits, seed {HALVES_SEED}",
    "kid": "unbiased, kernel (x·y/d + 1)³, all samples",
    "swd": f"{NUM_DIRECTIONS} directions, seed {DIRECTIONS_SEED}",
    "precision_recall": f"{PRECISION_NEIGHBORS} neighbours",
    "density_coverage": f"{DENSITY_NEIGHBORS} neighbours",
    "jsd": "characters, with beginning and end, bits",
    "self_bleu": "characters up to 4-grams, smoothed by ½, 500 of 2,000 texts",
}


# Makes samples by their numbers: int64 [n], on the worker's device → [n, …] as networks see them.
# Sample i must not depend on what else is asked for. One that makes them for labels has a method
# ``labels``: numbers → int64 [n].
Generate = Callable[[Tensor], Tensor]


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


class Evaluator:
    """Built on all workers when a run starts, then called on all of them to measure.

    Building checks, and is quick; without metrics it checks nothing. The first call prepares the
    extractor and looks at the real data; what it learns of them is kept in memory for the next, and
    their features on disk (:class:`~gatdist.evaluation.cache.RealFeatures`).

    Args:
        config: which metrics, of which features, on how many samples.
        dataset: the real samples.
        comm: the workers.
        device: where features are computed.
        conditional: whether fakes are made for labels.
        exact: make the numbers the same, bit for bit, on any number of workers: each adds up all
            features by itself.

    Raises:
        ConfigError: a metric or extractor is not known, or needs what is not there, or there would
            be fewer than two samples.
        DataError: the extractor can't handle the data.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        dataset: Dataset,
        comm: Communicator,
        device: torch.device,
        *,
        conditional: bool = False,
        exact: bool = False,
    ) -> None:
        self._metrics = {name: metrics[name] for name in config.metrics}
        self._dataset, self._comm, self._device = dataset, comm, device
        self._sharing = LocalCommunicator(device) if exact else comm
        self._num_samples = config.num_samples or dataset.num_samples
        self._features = "none"
        self._extractor: Extractor | None = None
        for name, metric in self._metrics.items():
            self._require_suits(name, metric, conditional)
        if any({"features", "classes"} & metric.needs for metric in self._metrics.values()):
            # The default suits what has labels. Points are features as they are.
            by_default = config.features == EvaluateConfig().features
            points = by_default and dataset.modality == "points"
            self._features = "points" if points else config.features
            self._extractor = build_extractor(self._features, dataset, comm, config)
            self._require_classes()
        if self._metrics:
            self._require_samples()

    def __call__(self, generate: Generate, discriminator: nn.Module | None = None) -> Evaluation:
        """Measure a generator.

        Args:
            generate: is asked for numbers 0 to ``num_samples`` − 1 in all, each by one worker.
            discriminator: for metrics of what it has learned, which need it.

        Returns:
            Under the metrics' names, and ``class_share_min``, the rarest class's share, if the
            features know classes.
        """
        real = self._real  # first, since it prepares the extractor
        made = self._sample_set(self._num_samples, generate)
        fake = replace(made, discriminator=discriminator)
        values: dict[str, float] = {}
        for metric in self._metrics.values():
            values |= metric.measure(real, fake)
            beat()
        protocol = self._protocol()
        if fake.scores is not None:
            classes = fake.scores.argmax(dim=1).cpu()
            histogram = torch.bincount(classes, minlength=self._dataset.num_classes)
            values["class_share_min"] = int(histogram.min()) / self._num_samples
            protocol["class_histogram"] = histogram.tolist()
        return Evaluation(values, protocol)

    def _require_suits(self, name: str, metric: Metric, conditional: bool) -> None:
        if "texts" in metric.needs and not isinstance(self._dataset.sample_format, TextFormat):
            rule = f"{name!r} compares texts, and the data holds {self._dataset.modality}"
            raise ConfigError("evaluate.metrics", rule, hint="Leave it out")
        if "discriminator" in metric.needs and not self._dataset.num_classes:
            rule = f"{name!r} needs class labels, and the data set has none"
            raise ConfigError("evaluate.metrics", rule, hint="Leave it out")
        if "labels" in metric.needs and not conditional:
            raise ConfigError(
                "evaluate.metrics",
                f"{name!r} needs a generator that is told the class",
                hint="Leave it out, or set model.conditional = true",
            )

    def _require_classes(self) -> None:
        for name, metric in self._metrics.items():
            if "classes" in metric.needs and self._extractor and not self._extractor.num_classes:
                raise ConfigError(
                    "evaluate.metrics",
                    f"{name!r} needs classes, and evaluate.features = {self._features!r} know none",
                    hint="Leave it out, or use the features 'classifier'",
                )

    def _require_samples(self) -> None:
        if self._dataset.num_samples < 2:
            rule = "holds fewer than 2 samples, too few to compare with"
            raise DataError("data.url", rule, hint="Set evaluate.metrics = []")
        if self._num_samples < 2:
            raise ConfigError("evaluate.num_samples", "must be at least 2", value=self._num_samples)

    @cached_property
    def _real(self) -> SampleSet:
        kept = None
        if self._extractor:
            self._extractor.prepare()
            kept = RealFeatures(self._features, self._extractor, self._dataset, self._comm)
        known = kept.read() if kept else None
        make = _Real(self._dataset, self._device)
        real = self._sample_set(self._dataset.num_samples, make, known)
        if kept and known is None:
            kept.keep(real.features)
        return replace(real, dataset=self._dataset)

    @torch.no_grad()
    def _sample_set(self, count: int, make: Generate, known: Tensor | None = None) -> SampleSet:
        """Samples 0 to ``count`` − 1, whose features may be known.

        They are cut into the same chunks whoever computes them, so that a sample's features do not
        depend on the number of workers; worker r of W makes the chunks r, r + W and so on.
        """
        sample_format, extractor = self._dataset.sample_format, self._extractor
        num_features = extractor.num_features if extractor and known is None else 0
        num_ids = sample_format.sample_shape[0] if isinstance(sample_format, TextFormat) else 0
        features = _Shared(self._comm, count, (num_features,), torch.float32)
        ids = _Shared(self._comm, count, (num_ids,), torch.uint8)
        labels = getattr(make, "labels", lambda positions: None)
        for chunk in features.mine if num_features or num_ids else ():
            start, end = chunk * _BATCH, min(count, (chunk + 1) * _BATCH)
            samples = sample_format.to_samples(make(torch.arange(start, end, device=self._device)))
            if extractor and num_features:
                features.put(chunk, extractor(sample_format.to_network(samples).float()))
            if num_ids:
                ids.put(chunk, samples)
            beat()
        found = features.gathered() if known is None else known
        share = found[self._sharing.rank :: self._sharing.world_size]
        texts = None
        if isinstance(sample_format, TextFormat):
            texts = [sample_format.vocabulary.decode(row) for row in ids.gathered().cpu().numpy()]
        return SampleSet(
            found,
            GaussianSums.of(share).reduced(self._sharing),
            self._sharing,
            scores=extractor.classify(found) if extractor else None,
            labels=labels(torch.arange(count, device=self._device)),
            texts=texts,
        )

    def _protocol(self) -> dict[str, Any]:
        return {
            "features": self._features,
            **(self._extractor.protocol if self._extractor else {}),
            "data": self._dataset.fingerprint,
            "split": "all real",
            "num_real": self._dataset.num_samples,
            "num_generated": self._num_samples,
            "resize": "none",
            "rounding": self._dataset.sample_format.rounding,
            **{
                key: how
                for key, how in _HOW.items()
                if key.removesuffix("_real_split") in self._metrics
            },
        }


@dataclass(frozen=True)
class _Real:
    """The real samples, by their numbers in the data set."""

    dataset: Dataset
    device: torch.device

    def __call__(self, positions: Tensor) -> Tensor:
        samples, _ = self.dataset.read(positions.cpu().numpy())
        return self.dataset.sample_format.to_network(torch.from_numpy(samples).to(self.device))


class _Shared:
    """One row of numbers a sample, made chunk by chunk by all workers, then known to all.

    Args:
        comm: the workers.
        count: samples.
        shape: of a row.
        dtype: of its numbers.

    Attributes:
        mine: the chunks that this worker makes.
    """

    def __init__(
        self, comm: Communicator, count: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        num_chunks = -(-count // _BATCH)
        rows = -(-num_chunks // comm.world_size)  # of the worker with the most: all gather alike
        self.mine = range(comm.rank, num_chunks, comm.world_size)
        self._comm, self._count = comm, count
        self._rows = torch.zeros(rows, _BATCH, *shape, dtype=dtype, device=comm.device)

    def put(self, chunk: int, values: Tensor) -> None:
        """Of a chunk of this worker, [samples in it, *shape]."""
        self._rows[(chunk - self._comm.rank) // self._comm.world_size, : len(values)] = values

    def gathered(self) -> Tensor:
        """[count, *shape], in the order of the samples."""
        if not self._rows.numel():
            return self._rows.new_zeros(self._count, *self._rows.shape[2:])
        # [W, rows, chunk, …], worker first → [rows, W, chunk, …]: row i of worker r is chunk
        # i·W + r.
        everything = self._comm.all_gather(self._rows).transpose(0, 1)
        return everything.reshape(-1, *self._rows.shape[2:])[: self._count].contiguous()
