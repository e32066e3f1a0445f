"""Feature extractors, whose features metrics compare instead of samples."""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gatdist.common.errors import DataError, PluginError
from gatdist.common.registry import Registry, user_code
from gatdist.config import EvaluateConfig
from gatdist.data.dataset import Dataset
from gatdist.data.sample_format import AudioFormat
from gatdist.models.audio import LogMel
from gatdist.models.structure import dtype_name
from gatdist.parallel.communicator import Communicator


class Extractor(ABC):
    """Maps samples to feature vectors, identically on every worker.

    A registered subclass is built as ``subclass(dataset, comm)`` on every worker when a run starts.
    The constructor refuses data that it can't handle, and is fast. One with a parameter ``config``
    also gets the section ``evaluate``. It sets ``num_features``, the length d of a feature vector,
    ``num_classes`` if it classifies, and ``is_trained`` if it is trained on the data set, so that
    statistics of its features are useless without the data.
    """

    num_features: int
    num_classes: int = 0
    is_trained: bool = False

    @property
    def protocol(self) -> dict[str, Any]:
        """JSON values that identify the features beyond the name; read after :meth:`prepare`.

        Unless empty, features of real samples are cached under them: they must change when the
        features do.
        """
        return {}

    def prepare(self) -> None:  # noqa: B027 - most extractors have nothing to prepare
        """Do slow preparations; called once, on all workers together, before any features."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Tensor:
        """Map samples [n, …] as networks see them, float32 → float32 [n, d] on the same device."""

    def classify(self, features: Tensor) -> Tensor | None:
        """Map features [n, d] → logits of classes [n, num_classes]; None without classes."""
        return None


extractors: Registry[Callable[..., Extractor]] = Registry("evaluate.features")


def build_extractor(
    name: str, dataset: Dataset, comm: Communicator, config: EvaluateConfig
) -> Extractor:
    """Build a registered extractor; raise PluginError if a user's returns a wrong type or shape."""
    builder: Callable[..., Extractor] = extractors[name]
    with user_code("evaluate.features", "can't be built", value=name):
        more = {"config": config} if "config" in inspect.signature(builder).parameters else {}
        extractor = builder(dataset, comm, **more)
    if getattr(builder, "__module__", "").startswith("gatdist."):
        return extractor
    if not isinstance(extractor, Extractor):
        rule = f"must build an Extractor; found {type(extractor).__name__}"
        raise PluginError("evaluate.features", rule, value=name)
    verified = _Verified(name, extractor)
    if type(extractor).prepare is Extractor.prepare:  # else it can't be called yet
        verified(torch.zeros(2, *dataset.sample_format.shape, device=comm.device))
    return verified


class _Verified(Extractor):
    """A user's extractor whose results are checked; raises PluginError."""

    def __init__(self, name: str, inner: Extractor) -> None:
        self._name, self._inner = name, inner
        for key, least in (("num_features", 1), ("num_classes", 0)):
            value = self._get(key)
            if not isinstance(value, int) or value < least:
                self._refuse(f"{key} must be an integer >= {least}; found {value!r}")
            setattr(self, key, value)
        self.is_trained = bool(self._get("is_trained"))

    @property
    def protocol(self) -> dict[str, Any]:
        found = self._get("protocol")
        self._run("its protocol is not JSON", json.dumps, found)
        return dict(found)

    def prepare(self) -> None:
        self._run("fails in prepare()", self._inner.prepare)

    def __call__(self, samples: Tensor) -> Tensor:
        found = self._run("fails with samples", self._inner, samples)
        return self._checked(found, (len(samples), self.num_features), samples.device)

    def classify(self, features: Tensor) -> Tensor | None:
        found = self._run("fails in classify()", self._inner.classify, features)
        if found is None:
            return None
        return self._checked(found, (len(features), self.num_classes), features.device)

    def _get(self, key: str) -> Any:
        return self._run(f"its {key} fails", getattr, self._inner, key)

    def _run(self, doing: str, function: Callable[..., Any], *args: Any) -> Any:
        with user_code("evaluate.features", doing, value=self._name):
            return function(*args)

    def _checked(self, found: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
        expected = f"must return float32 {shape} on {device}"
        if not isinstance(found, Tensor):
            self._refuse(f"{expected}; found {type(found).__name__}")
        kind = f"{dtype_name(found.dtype)} {tuple(found.shape)} on {found.device}"
        if found.dtype != torch.float32 or found.shape != shape or found.device != device:
            self._refuse(f"{expected}; found {kind}")
        return found.detach()

    def _refuse(self, rule: str) -> NoReturn:
        raise PluginError("evaluate.features", rule, value=self._name)


def register_feature_extractor(name: str) -> Callable[[Any], Any]:
    """Register a subclass of :class:`Extractor`, or its builder, for ``evaluate.features``."""
    return extractors.register(name)


@register_feature_extractor("points")
class Coordinates(Extractor):
    """The samples' own values; for points, and for small samples of any kind."""

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        self.num_features = math.prod(dataset.sample_format.shape)

    def __call__(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)


@register_feature_extractor("log_mel")
class LogMelStatistics(Extractor):
    """Means and deviations over time of log-mel spectrograms, [n, 2·C·bands]; for audio."""

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        if not isinstance(dataset.sample_format, AudioFormat):
            rule, hint = "needs audio, and the data set has none", "Choose other features"
            raise DataError("evaluate.features", rule, value="log_mel", hint=hint)
        self._front = LogMel.for_rate(dataset.sample_format.sample_rate).to(comm.device)
        self.num_features = 2 * dataset.sample_format.shape[0] * len(self._front.bands)

    @property
    def protocol(self) -> dict[str, Any]:
        front = self._front
        return {"log_mel": {"bands": len(front.bands), "window": front.window, "hop": front.hop}}

    def __call__(self, samples: Tensor) -> Tensor:
        levels = self._front(samples)  # [n, C, bands, frames]
        return torch.cat([levels.mean(dim=3), levels.std(dim=3)], dim=1).flatten(1)
