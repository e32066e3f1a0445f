"""Cache of trained classifiers and of features of real data, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress

import torch
from safetensors.torch import save
from torch import Tensor

from gatdist.common.errors import StorageError
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import cache_folder
from gatdist.data.dataset import Dataset
from gatdist.evaluation.features import Extractor
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store

_MAX_BYTES = 2**30


def read(name: str) -> dict[str, Tensor]:
    """Return the tensors of a cache entry, on the CPU; {} if it is absent or damaged."""
    store = _store()
    with suppress(StorageError, ValueError):
        if store.exists(name):
            return read_safetensors(store.read(name))
    return {}


def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a cache entry if the storage allows."""
    content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    with suppress(StorageError):
        _store().publish(name, content)


class RealFeatures:
    """Cached features and labels of real samples, read and written by worker 0.

    Keyed by data, their number, (prepared) extractor, torch and device type; only of extractors
    with a protocol.
    """

    def __init__(
        self, name: str, extractor: Extractor, dataset: Dataset, count: int, comm: Communicator
    ) -> None:
        self._dataset, self._comm = dataset, comm
        self._shape = (count, extractor.num_features)
        protocol = extractor.protocol
        message = {
            "features": name,
            "protocol": protocol,
            "data": dataset.reading,
            "count": count,
            "torch": torch.__version__,
            "device": comm.device.type,
        }
        digest = hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()
        small = 4 * self._shape[0] * self._shape[1] <= _MAX_BYTES
        self._name = f"real-{digest[:32]}.safetensors" if protocol and small else ""

    def read(self) -> tuple[Tensor, Tensor | None] | None:
        """Return features, float32 [n, d], and labels, int64 [n], or None if unlabelled.

        On the workers' device, identical on every worker. None if they are not cached.
        """
        like = {"features": torch.empty(self._shape)}
        if self._dataset.num_classes:
            like["labels"] = torch.empty(self._shape[0], dtype=torch.long)
        known = read(self._name) if self._name and self._comm.is_main else {}
        fits = known.keys() == like.keys() and all(
            (known[key].shape, known[key].dtype) == (x.shape, x.dtype) for key, x in like.items()
        )
        if not self._comm.any(fits):
            return None
        found = {
            key: self._comm.broadcast_((known if fits else like)[key].to(self._comm.device))
            for key in like
        }
        return found["features"], found.get("labels")

    def keep(self, features: Tensor, labels: Tensor | None) -> None:
        """Write them, unless bad samples were replaced by others."""
        bad = self._comm.any(bool(self._dataset.bad_samples))
        if self._name and self._comm.is_main and not bad:
            given = {"features": features} | ({} if labels is None else {"labels": labels})
            keep(self._name, given)


def _store() -> Store:
    return Store(str(cache_folder() / "features"))
