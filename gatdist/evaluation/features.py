"""Feature extractors: what a metric looks at instead of pixels. Users register their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gatdist.data import Dataset
from gatdist.parallel.communicator import Communicator
from gatdist.registry import Registry


class Extractor(ABC):
    """Maps samples to feature vectors, alike on all workers.

    A subclass is registered under a name and built as ``subclass(dataset, comm)`` on every worker
    when a run starts; there it refuses data that it can't handle, and does nothing that takes time.
    """

    @property
    @abstractmethod
    def num_features(self) -> int:
        """Length d of a feature vector."""

    @property
    def protocol(self) -> dict[str, Any]:
        """JSON values that say which features these are, beyond the name; after :meth:`prepare`."""
        return {}

    def prepare(self) -> None:  # noqa: B027 - most extractors have nothing to prepare
        """Do what takes time: once, on all workers at the same point, before any features."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """Samples [n, C, H, W] in [−1, 1] or points [n, k] → [n, d]; float32, on the device."""

    def classify(self, features: Tensor) -> Tensor | None:
        """Features [n, d] → classes int64 [n], or None where the features know no classes."""
        return None


extractors: Registry[Callable[[Dataset, Communicator], Extractor]] = Registry("evaluate.features")


def register_feature_extractor(name: str) -> Callable[[Any], Any]:
    """Decorator that names a subclass of :class:`Extractor`, or a function that builds one.

    The name is a value of ``evaluate.features``.

    Raises:
        PluginError: the name is taken.
    """
    return extractors.register(name)


@register_feature_extractor("points")
class Coordinates(Extractor):
    """The samples' own coordinates. For points."""

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        self._num_features = math.prod(dataset.sample_shape)

    @property
    def num_features(self) -> int:
        """The number of coordinates."""
        return self._num_features

    def __call__(self, samples: Tensor) -> Tensor:
        """Points [n, k] as they are."""
        return samples.flatten(1)
