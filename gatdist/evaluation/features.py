"""Feature extractors: what a metric looks at instead of pixels. Users register their own."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatdist.config import EvaluateConfig
from gatdist.data import Dataset
from gatdist.data.space import SoundSpace
from gatdist.errors import DataError
from gatdist.models.sounds.log_mel import LogMel
from gatdist.parallel.communicator import Communicator
from gatdist.registry import Registry


class Extractor(ABC):
    """Maps samples to feature vectors, alike on all workers.

    A subclass is registered under a name and built as ``subclass(dataset, comm)`` on every worker
    when a run starts; there it refuses data that it can't handle, and does nothing that takes time.
    One whose constructor has a parameter ``config`` gets the section ``evaluate`` too.
    """

    @property
    @abstractmethod
    def num_features(self) -> int:
        """Length d of a feature vector."""

    @property
    def protocol(self) -> dict[str, Any]:
        """JSON values that say which features these are, beyond the name; after :meth:`prepare`.

        If there are any, features of real samples are kept on disk under them, so that they must
        change when the features do.
        """
        return {}

    def prepare(self) -> None:  # noqa: B027 - most extractors have nothing to prepare
        """Do what takes time: once, on all workers at the same point, before any features."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """Samples [n, …] as networks see them, float32 → [n, d]; float32, on the device."""

    @property
    def num_classes(self) -> int:
        """Classes that the features know; 0 for none."""
        return 0

    def classify(self, features: Tensor) -> Tensor | None:
        """Features [n, d] → logits of classes [n, K], or None where they know no classes."""
        return None


extractors: Registry[Callable[..., Extractor]] = Registry("evaluate.features")


def build_extractor(
    name: str, dataset: Dataset, comm: Communicator, config: EvaluateConfig
) -> Extractor:
    """The extractor that ``evaluate.features`` names.

    Raises:
        ConfigError: it is not known, or not configured as it needs.
        DataError: it can't handle the data.
    """
    builder: Callable[..., Extractor] = extractors[name]
    more = {"config": config} if "config" in inspect.signature(builder).parameters else {}
    return builder(dataset, comm, **more)


def register_feature_extractor(name: str) -> Callable[[Any], Any]:
    """Decorator that names a subclass of :class:`Extractor`, or a function that builds one.

    The name is a value of ``evaluate.features``.

    Raises:
        PluginError: the name is taken.
    """
    return extractors.register(name)


@register_feature_extractor("points")
class Coordinates(Extractor):
    """The samples' own numbers. For points, and for small samples of any kind."""

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        self._num_features = math.prod(dataset.space.shape)

    @property
    def num_features(self) -> int:
        """The number of coordinates."""
        return self._num_features

    def __call__(self, samples: Tensor) -> Tensor:
        """Samples [n, …] as they are."""
        return samples.flatten(1)


@register_feature_extractor("log_mel")
class LogMelStatistics(Extractor):
    """Means and deviations over time of a sound's log-mel spectrogram. For sounds.

    Raises:
        DataError: the data are no sounds.
    """

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        if not isinstance(dataset.space, SoundSpace):
            rule = "needs sounds, and the data set has none"
            raise DataError(
                "evaluate.features", rule, value="log_mel", mend="Choose other features"
            )
        self._front = LogMel.for_rate(dataset.space.sample_rate).to(comm.device)
        self._num_features = 2 * dataset.space.shape[0] * len(self._front.bands)

    @property
    def num_features(self) -> int:
        """Two for each channel and band."""
        return self._num_features

    @property
    def protocol(self) -> dict[str, Any]:
        """The spectrogram's measures."""
        front = self._front
        return {"log_mel": {"bands": len(front.bands), "window": front.window, "hop": front.hop}}

    def __call__(self, samples: Tensor) -> Tensor:
        """Sounds [n, C, t] → [n, 2·C·bands]."""
        levels = self._front(samples)  # [n, C, bands, frames]
        return torch.cat([levels.mean(dim=3), levels.std(dim=3)], dim=1).flatten(1)
