"""Data: shards on any storage, read in an order that is a pure function of seed and position."""

from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format import (
    Manifest,
    Shard,
    read_manifest,
    write_dataset,
    write_manifest,
    write_shard,
)
from gatdist.data.loader import Batch, Loader, to_network, to_pixels
from gatdist.data.order import ORDER_VERSION, SampleOrder

__all__ = [
    "ORDER_VERSION",
    "Batch",
    "Dataset",
    "Loader",
    "Manifest",
    "SampleOrder",
    "Shard",
    "open_dataset",
    "read_manifest",
    "to_network",
    "to_pixels",
    "write_dataset",
    "write_manifest",
    "write_shard",
]
