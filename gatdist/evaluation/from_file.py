"""Features of images by a network from a file: Inception weights, or a TorchScript program."""

from __future__ import annotations

import hashlib
import io
import warnings
from abc import abstractmethod
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import EvaluateConfig, redact_url
from gatdist.data.dataset import Dataset
from gatdist.evaluation.features import Extractor, register_feature_extractor
from gatdist.evaluation.inception import NUM_FEATURES, Inception
from gatdist.parallel.communicator import Communicator
from gatdist.storage.store import at_file
from gatdist.storage.urls import absolute


class _FromFile(Extractor):
    """Features of images by the network in ``evaluate.features_file``.

    The file must have the SHA-256 ``evaluate.features_sha256``.
    """

    file_kind: str
    file_error: type[Exception]
    hint: str

    def __init__(self, dataset: Dataset, comm: Communicator, config: EvaluateConfig) -> None:
        if dataset.modality != "image":
            rule, hint = "needs images, and the data set has none", "Choose other evaluate.features"
            raise DataError("evaluate.features", rule, value=config.features, hint=hint)
        for key in ("features_file", "features_sha256"):
            if not getattr(config, key):
                rule = f"is required by evaluate.features = '{config.features}'"
                raise ConfigError(f"evaluate.{key}", rule)
        self._digest = config.features_sha256
        name = redact_url(config.features_file)
        try:
            self._load(_content(config), name, comm.device)
        except self.file_error as error:
            rule = f"is not {self.file_kind} ({str(error).strip().splitlines()[0]})"
            raise ConfigError("evaluate.features_file", rule, value=name, hint=self.hint) from None

    @abstractmethod
    def _load(self, content: bytes, name: str, device: torch.device) -> None: ...

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Map pixels, uint8 [n, 3, H, W] → features [n, …]."""

    @property
    def protocol(self) -> dict[str, Any]:
        return {"features_digest": self._digest}

    def __call__(self, samples: Tensor) -> Tensor:
        pixels = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if pixels.shape[1] == 1:  # grayscale
            pixels = pixels.expand(-1, 3, -1, -1)
        return self._features(pixels).float().flatten(1)


@register_feature_extractor("inception")
class InceptionFeatures(_FromFile):
    """The Inception network of published FIDs, from a safetensors file of its weights.

    Classes, for the Inception score, are those of its last layer without the bias (Salimans et al.
    2016): 1,008 for the weights of published FIDs.
    """

    num_features = NUM_FEATURES
    file_kind, file_error = "a safetensors file", SafetensorError
    hint = "Save the state_dict with safetensors"

    def _load(self, content: bytes, name: str, device: torch.device) -> None:
        self._network = Inception.with_weights(load(content), name).to(device)
        self.num_classes = self._network.fc.out_features

    def _features(self, pixels: Tensor) -> Tensor:
        return self._network(pixels)

    def classify(self, features: Tensor) -> Tensor:
        return features @ self._network.fc.weight.t()


@register_feature_extractor("torchscript")
class TorchScriptFeatures(_FromFile):
    """A TorchScript module that maps pixels, uint8 [n, 3, H, W], to features [n, d].

    If its forward has a parameter ``return_features``, it gets True, as the Inception network that
    was published with StyleGAN2-ADA (Karras et al. 2020) needs. TorchScript is a program: the
    digest is the only check of its origin.
    """

    file_kind, file_error = "TorchScript", RuntimeError
    hint = "Save the network with torch.jit.save"

    def __init__(self, dataset: Dataset, comm: Communicator, config: EvaluateConfig) -> None:
        super().__init__(dataset, comm, config)
        with torch.no_grad():
            shown = self(torch.zeros(1, *dataset.sample_format.shape, device=comm.device))
        self.num_features = shown.shape[1]

    def _load(self, content: bytes, name: str, device: torch.device) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            self._network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        known = [argument.name for argument in self._network.forward.schema.arguments]
        self._more = {"return_features": True} if "return_features" in known else {}

    def _features(self, pixels: Tensor) -> Tensor:
        return self._network(pixels, **self._more)


def _content(config: EvaluateConfig) -> bytes:
    store, name = at_file(absolute(config.features_file))
    content = store.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != config.features_sha256:
        raise ConfigError(
            "evaluate.features_sha256",
            f"{redact_url(config.features_file)} has another digest: {found}",
            value=config.features_sha256,
            hint="Download the file again, or correct the digest if you trust the file",
        )
    return content
