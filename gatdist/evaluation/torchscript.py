"""Features by a network that comes as a TorchScript file, such as the Inception network of FID."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor

from gatdist.config import EvaluateConfig, masked_url
from gatdist.data import Dataset
from gatdist.errors import ConfigError, DataError
from gatdist.evaluation.features import Extractor, register_feature_extractor
from gatdist.parallel.communicator import Communicator
from gatdist.storage import absolute, at_file


@register_feature_extractor("torchscript")
class TorchScriptFeatures(Extractor):
    """What the module in ``evaluate.features_file`` makes of pictures.

    It takes pixels, uint8 [n, 3, H, W] (gray ones three times), and gives [n, d]. If its forward
    has a parameter ``return_features``, it is given True, as the Inception network of Heusel et al.
    (2017) wants that was published as TorchScript with StyleGAN2-ADA (Karras et al. 2020).
    TorchScript is a program; only the file whose SHA-256 is ``evaluate.features_sha256`` is run.

    Args:
        dataset: pictures.
        comm: the workers.
        config: names the file.

    Raises:
        ConfigError: no file or digest is named, the file has another digest, or is no TorchScript.
        DataError: the data are no pictures.
        StorageError: the file can't be read.
    """

    def __init__(self, dataset: Dataset, comm: Communicator, config: EvaluateConfig) -> None:
        if dataset.modality != "image":
            rule = "needs pictures, and the data set has none"
            mend = "Choose other evaluate.features"
            raise DataError("evaluate.features", rule, value="torchscript", mend=mend)
        for key in ("features_file", "features_sha256"):
            if not getattr(config, key):
                rule = "is required by evaluate.features = 'torchscript'"
                raise ConfigError(f"evaluate.{key}", rule)
        self._digest = config.features_sha256
        self._network = _load(config, comm.device)
        # Parameters of the forward of a ScriptModule, as its schema tells them.
        known = [argument.name for argument in self._network.forward.schema.arguments]
        self._more = {"return_features": True} if "return_features" in known else {}
        with torch.no_grad():
            shown = self(torch.zeros(1, *dataset.space.shape, device=comm.device))
        self._num_features = shown.shape[1]

    @property
    def num_features(self) -> int:
        """What the module gives of each picture."""
        return self._num_features

    @property
    def protocol(self) -> dict[str, Any]:
        """The file's digest."""
        return {"features_digest": self._digest}

    def __call__(self, samples: Tensor) -> Tensor:
        """Pictures [n, C, H, W] in [−1, 1] → [n, d]."""
        pixels = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        features: Tensor = self._network(pixels, **self._more)
        return features.float().flatten(1)


def _load(config: EvaluateConfig, device: torch.device) -> Any:
    store, name = at_file(absolute(config.features_file))
    content = store.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != config.features_sha256:
        raise ConfigError(
            "evaluate.features_sha256",
            f"{masked_url(config.features_file)} has another: {found}",
            value=config.features_sha256,
            mend="Fetch the file again, or correct the digest if you trust the file",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is old, and so are published networks
            return torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            "evaluate.features_file",
            f"is no TorchScript ({reason})",
            value=masked_url(config.features_file),
            mend="Save the network with torch.jit.save",
        ) from None
