"""Cache of trained classifiers and features of real data, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gatdist.common.errors import StorageError
from gatdist.config import cache_folder
from gatdist.data.dataset import Dataset
from gatdist.evaluation.features import Extractor
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store

_MAX_BYTES = 2**30


def read(name: str) -> dict[str, Tensor]:
    """Return the tensors of a cache entry, on the CPU; {} if it is absent or damaged."""
    store = _store()
    with suppress(StorageError, SafetensorError):
        if store.exists(name):
            return load(store.read(name))
    return {}


def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a cache entry if the storage allows."""
    content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    with suppress(StorageError):
        _store().publish(name, content)


class RealFeatures:
    """Cached features of all real samples, read and written by worker 0.

    Keyed by data, (prepared) extractor, torch and device type; only of extractors with a protocol.
    """

    def __init__(
        self, name: str, extractor: Extractor, dataset: Dataset, comm: Communicator
    ) -> None:
        self._dataset, self._comm = dataset, comm
        self._shape = (dataset.num_samples, extractor.num_features)
        protocol = extractor.protocol
        message = {
            "features": name,
            "protocol": protocol,
            "data": dataset.reading,
            "torch": torch.__version__,
            "device": comm.device.type,
        }
        digest = hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()
        small = 4 * self._shape[0] * self._shape[1] <= _MAX_BYTES
        self._name = f"real-{digest[:32]}.safetensors" if protocol and small else ""

    def read(self) -> Tensor | None:
        """Return float32 [n, d] on the workers' device, identical on every worker; or None."""
        known = read(self._name).get("features") if self._name and self._comm.is_main else None
        fits = known is not None and known.shape == self._shape and known.dtype == torch.float32
        if not self._comm.any(fits):
            return None
        features = torch.empty(self._shape) if known is None else known
        return self._comm.broadcast_(features.to(self._comm.device))

    def keep(self, features: Tensor) -> None:
        """Write them, unless bad samples were replaced by others."""
        bad = self._comm.any(bool(self._dataset.bad_samples))
        if self._name and self._comm.is_main and not bad:
            keep(self._name, {"features": features})


def _store() -> Store:
    return Store(str(cache_folder() / "features"))
