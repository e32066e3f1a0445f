"""Data: shards on any storage, read in an order that depends on seed and position only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format import Shard, write_dataset, write_manifest, write_shard
from gatdist.data.modalities import ReadSpec
from gatdist.data.order import SampleOrder

if TYPE_CHECKING:
    from gatdist.data.loader import Batch, Loader
    from gatdist.data.sample_format import SampleFormat, sample_format_of

# Imported on first use: packing, indexing and verifying do without torch.
_NEEDS_TORCH = {
    "Batch": "gatdist.data.loader",
    "Loader": "gatdist.data.loader",
    "SampleFormat": "gatdist.data.sample_format",
    "sample_format_of": "gatdist.data.sample_format",
}

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "ReadSpec",
    "SampleFormat",
    "SampleOrder",
    "Shard",
    "open_dataset",
    "sample_format_of",
    "write_dataset",
    "write_manifest",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'gatdist.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
