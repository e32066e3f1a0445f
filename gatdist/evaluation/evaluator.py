"""The evaluator: a generator's samples against all real ones, with the protocol reported."""

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
from gatdist.data.dataset import Dataset
from gatdist.data.sample_format import TextFormat
from gatdist.evaluation import classifier, distances, from_file  # noqa: F401  (they register)
from gatdist.evaluation.cache import RealFeatures
from gatdist.evaluation.features import Extractor, build_extractor
from gatdist.evaluation.metrics import Need, SampleSet, metrics
from gatdist.parallel.communicator import Communicator, LocalCommunicator

_BATCH = 256
_HOW: Mapping[str, str] = {
    "fid": "unbiased covariances, float64",
    "fid_real_split": f"median of {distances.NUM_SPLITS} splits, seed {distances.SPLIT_SEED}",
    "kid": "unbiased, kernel (x·y/d + 1)³, all samples",
    "swd": f"{distances.NUM_DIRECTIONS} directions, seed {distances.DIRECTIONS_SEED}",
    "precision_recall": f"{distances.PRECISION_NEIGHBORS} neighbours",
    "density_coverage": f"{distances.DENSITY_NEIGHBORS} neighbours",
    "jsd": "characters, with beginning and end, bits",
    "self_bleu": "characters up to 4-grams, smoothed by ½, 500 of 2,000 texts",
}

# Positions int64 [n] on the worker's device → samples [n, …] as networks see them. Sample i must
# not depend on the other positions. A class-conditional one has a method ``labels``: positions →
# int64 [n].
Generate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and how they were measured, as JSON values; identical on every worker.

    Compare metrics of equal protocols only.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


class Evaluator:
    """Built on all workers when a run starts, then called on all of them to measure.

    The constructor only validates. The first call prepares the extractor and measures the real
    data; later calls reuse the results, and other runs their features
    (:class:`~gatdist.evaluation.cache.RealFeatures`). ``exact`` makes results bit-identical on any
    number of workers: each sums up all features.
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
        self._require_suitable(conditional)
        if any({"features", "classes"} & metric.needs for metric in self._metrics.values()):
            # The default needs labels. Points are features as they are.
            by_default = config.features == EvaluateConfig().features
            points = by_default and dataset.modality == "points"
            self._features = "points" if points else config.features
            self._extractor = build_extractor(self._features, dataset, comm, config)
            rule = f"needs classes, and evaluate.features = {self._features!r} has none"
            hint = "Remove it, or use the features 'classifier'"
            self._refuse("classes", rule, hint, unless=self._extractor.num_classes > 0)
        if self._metrics and dataset.num_samples < 2:
            rule = "holds fewer than 2 samples; metrics need 2"
            raise DataError("data.url", rule, hint="Set evaluate.metrics = []")
        if self._metrics and self._num_samples < 2:
            raise ConfigError("evaluate.num_samples", "must be at least 2", value=self._num_samples)

    def __call__(self, generate: Generate, discriminator: nn.Module | None = None) -> Evaluation:
        """Measure a generator, called for positions 0 to ``num_samples`` − 1, each on one worker.

        If the features have classes, the metrics include ``class_share_min``, the rarest's share.
        """
        real = self._real  # first, since it prepares the extractor
        fake = self._sample_set(self._num_samples, generate)
        fake = replace(fake, discriminator=discriminator)
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

    def _require_suitable(self, conditional: bool) -> None:
        data = self._dataset
        is_text = isinstance(data.sample_format, TextFormat)
        labels = "needs class labels, and the data set has none"
        generator = "needs a class-conditional generator"
        hint = "Remove it, or set model.conditional = true"
        self._refuse("texts", f"compares texts, and the data holds {data.modality}", unless=is_text)
        self._refuse("discriminator", labels, unless=data.num_classes > 0)
        self._refuse("labels", generator, hint, unless=conditional)

    def _refuse(self, need: Need, rule: str, hint: str = "Remove it", *, unless: bool) -> None:
        """Raise ConfigError if a metric has this need, unless it is met."""
        for name, metric in self._metrics.items():
            if need in metric.needs and not unless:
                raise ConfigError("evaluate.metrics", f"{name!r} {rule}", hint=hint)

    @cached_property
    def _real(self) -> SampleSet:
        kept = None
        if self._extractor:
            self._extractor.prepare()
            kept = RealFeatures(self._features, self._extractor, self._dataset, self._comm)
        known = kept.read() if kept else None
        real = self._sample_set(self._dataset.num_samples, self._real_samples, known)
        if kept and known is None:
            kept.keep(real.features)
        return replace(real, dataset=self._dataset)

    def _real_samples(self, positions: Tensor) -> Tensor:
        samples, _ = self._dataset.read(positions.cpu().numpy())
        return self._dataset.sample_format.to_network(torch.from_numpy(samples).to(self._device))

    @torch.no_grad()
    def _sample_set(self, count: int, make: Generate, known: Tensor | None = None) -> SampleSet:
        """Return samples 0 to ``count`` − 1, whose features may be known.

        Worker r of W computes the chunks r, r + W, …; they do not depend on W, so that a sample's
        features do not either.
        """
        sample_format, extractor = self._dataset.sample_format, self._extractor
        num_features = extractor.num_features if extractor and known is None else 0
        num_ids = sample_format.sample_shape[0] if isinstance(sample_format, TextFormat) else 0
        features = _Shared(self._comm, count, num_features, torch.float32)
        ids = _Shared(self._comm, count, num_ids, torch.uint8)
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
        texts: list[str] = []
        if isinstance(sample_format, TextFormat):
            texts = [sample_format.vocabulary.decode(row) for row in ids.gathered().cpu().numpy()]
        return SampleSet(
            found,
            distances.GaussianSums.of(share).reduced(self._sharing),
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
        } | {k: how for k, how in _HOW.items() if k.removesuffix("_real_split") in self._metrics}


class _Shared:
    """Rows [count, width], computed chunk by chunk by all workers (``mine``), then gathered."""

    def __init__(self, comm: Communicator, count: int, width: int, dtype: torch.dtype) -> None:
        num_chunks = -(-count // _BATCH)
        rows = -(-num_chunks // comm.world_size)  # of the worker with the most: gathers need it
        self.mine = range(comm.rank, num_chunks, comm.world_size)
        self._comm, self._count = comm, count
        self._rows = torch.zeros(rows, _BATCH, width, dtype=dtype, device=comm.device)

    def put(self, chunk: int, values: Tensor) -> None:
        self._rows[(chunk - self._comm.rank) // self._comm.world_size, : len(values)] = values

    def gathered(self) -> Tensor:
        width = self._rows.shape[2]
        if not self._rows.numel():
            return self._rows.new_zeros(self._count, width)
        # [W, rows, batch, width] → [rows, W, …]: row i of worker r is chunk i·W + r.
        everything = self._comm.all_gather(self._rows).transpose(0, 1)
        return everything.reshape(-1, width)[: self._count].contiguous()
