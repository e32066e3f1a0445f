"""The evaluator: a generator's samples against all real ones, with the protocol reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError, DataError
from gatdist.common.heartbeat import beat
from gatdist.common.numerics import tf32
from gatdist.config import EvaluateConfig
from gatdist.data.dataset import Dataset
from gatdist.data.sample_format import TextFormat
from gatdist.evaluation import classifier, distances, from_file  # noqa: F401  (they register)
from gatdist.evaluation.cache import RealFeatures
from gatdist.evaluation.distances import Gaussian
from gatdist.evaluation.features import Extractor, build_extractor, extractors
from gatdist.evaluation.metrics import Need, SampleSet, metrics
from gatdist.evaluation.paired import PairedMetric, Pairs
from gatdist.evaluation.statistics import Statistics, StatisticsOnly
from gatdist.evaluation.validation import require_two_samples
from gatdist.parallel.communicator import Communicator, LocalCommunicator

_BATCH = 256
# Neighbouring samples that are taken together from a part of the data.
_RUN = 64
_MAX_BY_DEFAULT = 10_000_000  # generated samples, unless their number is configured

# Positions int64 [n] on the worker's device → samples [n, …] as networks see them. Sample i must
# not depend on the other positions. A class-conditional one has a method ``labels``: positions →
# int64 [n]. One with inputs from the data has ``targets`` and ``pairs``: positions → what should be
# generated [n, …], and both.
Generate = Callable[[Tensor], Tensor]


class DatasetSamples:
    """``count`` samples of a data set and their labels, as :data:`Generate`; see :func:`evenly`.

    ``targets`` computes samples that are not as in the data.
    """

    def __init__(self, dataset: Dataset, count: int, targets: Generate | None = None) -> None:
        self._dataset, self._count, self._targets = dataset, count, targets
        self._positions = torch.empty(0, dtype=torch.long)
        self._read: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, positions: Tensor) -> Tensor:
        """Return samples as networks see them."""
        if self._targets is not None:
            return self._targets(self._numbers(positions))
        samples, _ = self._at(positions)
        return self._dataset.sample_format.to_network(samples.to(positions.device))

    def labels(self, positions: Tensor) -> Tensor | None:
        """Return int64 [n]; None if the data set has no classes."""
        _, labels = self._at(positions)
        return None if labels is None else labels.to(positions.device)

    def _at(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        positions = positions.cpu()
        if self._read is None or not torch.equal(positions, self._positions):
            samples, labels = self._dataset.read(self._numbers(positions).numpy())
            self._positions = positions
            self._read = torch.from_numpy(samples), None
            if labels is not None:
                self._read = self._read[0], torch.from_numpy(labels)
        return self._read

    def _numbers(self, positions: Tensor) -> Tensor:
        return evenly(positions, self._count, self._dataset.num_samples)


def evenly(positions: Tensor, count: int, available: int) -> Tensor:
    """Return numbers of samples for the positions 0 to ``count`` − 1, int64, in ascending order.

    They are spread over ``available`` samples, in runs of neighbours, which are read together.
    """
    if available < 2 * count:
        return positions * available // count
    every = available // -(-count // _RUN)
    return positions // _RUN * every + positions % _RUN


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
    number of workers: each sums up all features. Features are computed of ``at_once`` samples at a
    time, and of 256 by default. Of ``StatisticsOnly``, metrics that need real samples raise
    ConfigError. ``training`` is the data of the run, from which learned features are learned; None:
    ``dataset``.
    ``has_pairs``: whether the generator has inputs from the data, and so a target per sample.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        dataset: Dataset | StatisticsOnly,
        comm: Communicator,
        device: torch.device,
        *,
        conditional: bool = False,
        exact: bool = False,
        at_once: int | None = None,
        training: Dataset | StatisticsOnly | None = None,
        has_pairs: bool = False,
    ) -> None:
        self._at_once = at_once or _BATCH
        self._metrics = {name: metrics[name] for name in config.metrics}
        self._needs = {need for metric in self._metrics.values() for need in metric.needs}
        self._statistics = dataset.statistics if isinstance(dataset, StatisticsOnly) else None
        # Extractors take it for one; those that read it refuse it.
        self._dataset = cast("Dataset", dataset)
        self._training = training
        self._has_pairs = has_pairs
        self._real_samples: SampleSet | None = None
        self._comm, self._device = comm, device
        self._sharing = LocalCommunicator(device) if exact else comm
        self._num_real = min(config.num_real or dataset.num_samples, dataset.num_samples)
        self._num_samples = config.num_samples or self._num_real
        self._features = "none"
        self._extractor: Extractor | None = None
        self._paired = {
            name: each for name, each in self._metrics.items() if isinstance(each, PairedMetric)
        }
        self._require_suitable(conditional)
        if self._needs & {"features", "classes"}:
            # The default needs labels. Points are features as they are.
            by_default = config.features == EvaluateConfig().features
            points = by_default and dataset.modality == "points"
            self._features = "points" if points else config.features
            self._extractor = self._built_extractor(config)
            rule = f"needs classes, and evaluate.features = {self._features!r} has none"
            hint = "Remove it, or use the features 'classifier'"
            self._refuse("classes", rule, hint, unless=self._extractor.num_classes > 0)
        if self._metrics and not self._statistics:
            require_two_samples(self._dataset, training)
        if self._metrics and self._statistics and not config.num_samples:
            self._require_number(self._statistics.url)
        if self._metrics and self._num_samples < 2:
            raise ConfigError("evaluate.num_samples", "must be at least 2", value=self._num_samples)
        if has_pairs and 0 < dataset.num_samples < self._num_samples and not self._statistics:
            rule = f"must be at most {dataset.num_samples:,}, the samples with inputs"
            raise ConfigError("evaluate.num_samples", rule, value=self._num_samples)

    @tf32(False)
    def __call__(self, generate: Generate, discriminator: nn.Module | None = None) -> Evaluation:
        """Measure a generator, called for positions 0 to ``num_samples`` − 1, each on one worker.

        If the features' classes are those of the data, the metrics include ``class_share_min``, the
        rarest's share.
        """
        real = self._real(generate)  # first, since it prepares the extractor
        fake = self._sample_set(
            self._num_samples,
            generate,
            with_labels="labels" in self._needs,
            with_pairs=bool(self._paired),
        )
        if self._extractor and "classes" in self._needs | self._classes_of_data:
            fake = replace(fake, scores=self._extractor.classify(fake.features))
        fake = replace(fake, discriminator=discriminator)
        values: dict[str, float] = {}
        for metric in self._metrics.values():
            values |= metric.measure(real, fake)
            beat()
        protocol = self._protocol()
        if fake.scores is not None and self._classes_of_data:
            classes = fake.scores.argmax(dim=1).cpu()
            histogram = torch.bincount(classes, minlength=self._dataset.num_classes)
            values["class_share_min"] = int(histogram.min()) / self._num_samples
            protocol["class_histogram"] = histogram.tolist()
        # Eigenvalues and sums of the same numbers may differ between devices; decisions must not.
        return Evaluation(*self._comm.broadcast_object([values, protocol]))

    @tf32(False)
    def statistics(self) -> Statistics:
        """Return mean and covariance of the real features; the metrics include ``fid``.

        Raises ConfigError if the features are trained on the data.
        """
        assert self._extractor is not None
        if self._extractor.is_trained:
            rule = "are trained on the data, so that their statistics are useless without it"
            hint = "Choose others, such as inception or points"
            raise ConfigError("evaluate.features", rule, value=self._features, hint=hint)
        fit = self._real().fit
        found = Gaussian(fit.mean, fit.covariance)
        if not (found.mean.isfinite().all() and found.covariance.isfinite().all()):
            raise DataError("evaluate.features", "are not all finite", value=self._features)
        return Statistics(found, self._protocol_of_extractor() | self._protocol_of_data())

    @property
    def _classes_of_data(self) -> set[Need]:
        """``classes`` if the features' are those of the data set."""
        num_classes = self._extractor.num_classes if self._extractor else 0
        return {"classes"} if num_classes and num_classes == self._dataset.num_classes else set()

    def _built_extractor(self, config: EvaluateConfig) -> Extractor:
        if self._statistics and getattr(extractors[self._features], "is_trained", False):
            rule = f"are trained on data, and {self._statistics.url} holds statistics alone"
            hint = "Choose others, or use --against DATA"
            raise ConfigError("evaluate.features", rule, value=self._features, hint=hint)
        learns_from = cast("Dataset", self._training or self._dataset)
        return build_extractor(self._features, learns_from, self._comm, config)

    def _require_suitable(self, conditional: bool) -> None:
        data = self._dataset
        if self._statistics:
            rule = f"needs real samples, and {self._statistics.url} holds statistics alone"
            self._refuse("real_samples", rule, "Remove it, or use --against DATA", unless=False)
        is_text = isinstance(data.sample_format, TextFormat)
        labels = "needs class labels, and the data set has none"
        generator = "needs the classes that samples were generated for"
        hint = "Remove it, set model.conditional = true, or give samples the classes of the data"
        self._refuse("texts", f"compares texts, and the data holds {data.modality}", unless=is_text)
        self._refuse("discriminator", labels, unless=data.num_classes > 0)
        self._refuse("labels", generator, hint, unless=conditional)
        pairs = "compares outputs with their targets, and the generator has no inputs from the data"
        self._refuse("pairs", pairs, unless=self._has_pairs)
        for name, metric in self._metrics.items():
            if metric.modalities and data.modality not in metric.modalities:
                compared = " and ".join(f"{each!r}" for each in metric.modalities)
                rule = f"{name!r} compares {compared}, and the data holds {data.modality!r}"
                raise ConfigError("evaluate.metrics", rule, hint="Remove it")
            if problem := metric.unsuitable(data.sample_format):
                rule = f"{name!r} {problem}"
                raise ConfigError("evaluate.metrics", rule, hint="Or remove it")

    def _refuse(self, need: Need, rule: str, hint: str = "Remove it", *, unless: bool) -> None:
        """Raise ConfigError if a metric has this need, unless it is met."""
        for name, metric in self._metrics.items():
            if need in metric.needs and not unless:
                raise ConfigError("evaluate.metrics", f"{name!r} {rule}", hint=hint)

    def _require_number(self, url: str) -> None:
        """Refuse to generate as many samples as statistics say, if they say none or too many."""
        if 0 < self._num_samples <= _MAX_BY_DEFAULT:
            return
        rule = f"is required: {url} does not record how many samples it is of"
        if self._num_samples:
            rule = f"is required: {url} is of {self._num_samples:,} samples"
        raise ConfigError("evaluate.num_samples", rule, hint="Set it, or use --num")

    def _real(self, generate: Generate | None = None) -> SampleSet:
        if self._real_samples is None:
            self._real_samples = self._measure_real(generate)
        return self._real_samples

    def _measure_real(self, generate: Generate | None) -> SampleSet:
        kept = None
        if self._extractor:
            self._extractor.prepare()
            if self._statistics:
                return self._known(self._extractor, self._statistics)
            if not self._has_pairs:  # targets may be computed
                kept = RealFeatures(
                    self._features, self._extractor, self._dataset, self._num_real, self._comm
                )
        known = kept.read() if kept else None
        targets = getattr(generate, "targets", None)
        samples = DatasetSamples(self._dataset, self._num_real, targets)
        has_labels = self._dataset.num_classes > 0
        real = self._sample_set(self._num_real, samples, known, with_labels=has_labels)
        if kept and known is None:
            kept.keep(real.features, real.labels)
        return replace(real, dataset=self._dataset)

    def _known(self, extractor: Extractor, statistics: Statistics) -> SampleSet:
        num_features = extractor.num_features
        statistics.require_features(self._protocol_of_extractor(), num_features)
        features = torch.zeros(0, num_features, device=self._device)
        fit = Gaussian(*(x.to(self._device) for x in vars(statistics.fit).values()))
        return SampleSet(features, fit, self._sharing)

    @torch.no_grad()
    def _sample_set(
        self,
        count: int,
        make: Generate,
        known: tuple[Tensor, Tensor | None] | None = None,
        *,
        with_labels: bool = False,
        with_pairs: bool = False,
    ) -> SampleSet:
        """Return samples 0 to ``count`` − 1, whose features and labels may be known.

        Worker r of W computes the chunks r, r + W, …; they do not depend on W, so that a sample's
        features do not either.
        """
        sample_format, extractor = self._dataset.sample_format, self._extractor
        num_features = extractor.num_features if extractor and known is None else 0
        num_ids = sample_format.sample_shape[0] if isinstance(sample_format, TextFormat) else 0
        with_labels = with_labels and num_features > 0
        features = _Shared(self._comm, count, num_features, torch.float32)
        ids = _Shared(self._comm, count, num_ids, torch.uint8)
        labels = _Shared(self._comm, count, int(with_labels), torch.long)
        names = [name for metric in self._paired.values() for name in metric.values]
        pairs = _Shared(self._comm, count, len(names) * with_pairs, torch.float64)
        labels_of: Any = getattr(make, "labels", None)
        pairs_of: Any = getattr(make, "pairs", None)
        for chunk in features.mine if num_features or num_ids or with_pairs else ():
            start, end = chunk * _BATCH, min(count, (chunk + 1) * _BATCH)
            positions = torch.arange(start, end, device=self._device)
            made, targets = pairs_of(positions) if with_pairs else (make(positions), None)
            if targets is not None:
                pairs.put(chunk, self._compared(made, targets))
            if extractor and num_features:
                seen = (sample_format.rounded(x).float() for x in made.split(self._at_once))
                features.put(chunk, torch.cat([extractor(x) for x in seen]))
            if num_ids:
                ids.put(chunk, sample_format.to_samples(made))
            if with_labels:
                labels.put(chunk, labels_of(positions)[:, None])
            beat()
        gathered = features.gathered(), labels.gathered()[:, 0] if with_labels else None
        found, classes = gathered if known is None else known
        share = found[self._sharing.rank :: self._sharing.world_size]
        texts: list[str] = []
        if isinstance(sample_format, TextFormat):
            texts = [sample_format.vocabulary.decode(row) for row in ids.gathered().cpu().numpy()]
        columns = pairs.gathered().unbind(1) if with_pairs else ()
        return SampleSet(
            found,
            distances.GaussianSums.of(share).reduced(self._sharing),
            self._sharing,
            labels=classes,
            texts=texts,
            pairs=dict(zip(names, columns, strict=False)),
        )

    def _compared(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the values of all metrics of pairs, float64 [n, number of values]."""
        if outputs.shape != targets.shape:
            made, wanted = (list(each.shape[1:]) for each in (outputs, targets))
            rule = f"outputs are {made}, and their targets {wanted}"
            raise ConfigError("evaluate.metrics", rule, value=", ".join(self._paired))
        form = self._dataset.sample_format
        rate = form.spec.sample_rate or 0
        pairs = Pairs(form.rounded(outputs).float(), form.rounded(targets).float(), rate)
        return torch.cat([metric.of(pairs) for metric in self._paired.values()], 1)

    def _protocol(self) -> dict[str, Any]:
        how = {k: v for metric in self._metrics.values() for k, v in metric.protocol.items()}
        if self._statistics:
            how = {k: v for k, v in how.items() if not k.endswith("_real_split")}
            unknown = dict.fromkeys(("data", "num_real"), "not recorded")
            real = unknown | self._statistics.of_data | {"statistics": self._statistics.sha256}
        else:
            real = self._protocol_of_data()
        return {
            **self._protocol_of_extractor(),
            **real,
            "num_generated": self._num_samples,
            "rounding": self._dataset.sample_format.rounding,
            **how,
        }

    def _protocol_of_extractor(self) -> dict[str, Any]:
        found = self._extractor.protocol if self._extractor else {}
        return {"features": self._features, "resize": "none"} | found

    def _protocol_of_data(self) -> dict[str, Any]:
        return {
            "data": self._dataset.fingerprint,
            "data_resize": self._dataset.resize or "none",
            "split": self._split,
            "num_real": self._num_real,
        }

    @property
    def _split(self) -> str:
        """Which data the samples are compared with."""
        if self._dataset.part is not None:
            return self._dataset.part.name
        training = self._training
        if isinstance(training, Dataset) and training.fingerprint != self._dataset.fingerprint:
            return "separate data"
        return "training data" if training and self._has_pairs else "all real"


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
