"""Features of images by a network from a file: Inception weights, or a TorchScript program."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, DataError
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import EvaluateConfig, redact_url
from gatdist.data.dataset import Dataset
from gatdist.evaluation.features import Extractor, register_feature_extractor
from gatdist.evaluation.inception import NUM_FEATURES, SIDE, Inception
from gatdist.models.torchscript import FrozenNetwork, read_verified
from gatdist.parallel.communicator import Communicator

# Of pt_inception-2015-12-05-6726825d.pth, in the release fid_weights of mseitzer/pytorch-fid.
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class _FromFile(Extractor):
    """Features of images by the network in ``evaluate.features_file``.

    The file must have the SHA-256 ``evaluate.features_sha256``, or the default.
    """

    file_kind: str
    file_error: type[Exception]
    hint: str
    default_sha256 = ""

    def __init__(self, dataset: Dataset, comm: Communicator, config: EvaluateConfig) -> None:
        if dataset.modality != "image":
            rule, hint = "needs images, and the data set has none", "Choose other evaluate.features"
            raise DataError("evaluate.features", rule, value=config.features, hint=hint)
        self._digest = config.features_sha256.lower() or self.default_sha256
        content = read_verified(
            config.features_file,
            self._digest,
            file_key="evaluate.features_file",
            sha256_key="evaluate.features_sha256",
        )
        name = redact_url(config.features_file)
        try:
            self._load(content, name, comm.device)
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
    """The Inception network of published FIDs, from a file of its weights.

    The file is the published ``.pth``, or a safetensors file with the same names. Classes, for the
    Inception score, are those of the last layer without its bias (Salimans et al. 2016): 1,008.
    """

    num_features = NUM_FEATURES
    default_sha256 = PUBLISHED_SHA256
    file_kind, file_error = "the published .pth file or a safetensors file", ValueError
    hint = "Download the published file, or save the state_dict with safetensors"

    def _load(self, content: bytes, name: str, device: torch.device) -> None:
        if self._digest == PUBLISHED_SHA256:
            # The only pickle that is read, and a known one.
            file = io.BytesIO(content)
            weights = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
        else:
            weights = read_safetensors(content)
        self._network = Inception.with_weights(weights, name).to(device)
        self.num_classes = self._network.fc.out_features

    @property
    def protocol(self) -> dict[str, Any]:
        resize = f"{SIDE} × {SIDE}, bilinear without antialiasing, as TensorFlow 1"
        return super().protocol | {"resize": resize}

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
        self._network = FrozenNetwork(content)
        known = self._network.parameters
        self._more: dict[str, Any] = {"return_features": True} if "return_features" in known else {}

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._network(pixels, **self._more)
        return features
