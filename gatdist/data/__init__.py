"""Data: shards on any storage, read in an order that depends on seed and position only."""

from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format.manifest import Shard, write_manifest
from gatdist.data.format.shard_files import write_dataset, write_shard
from gatdist.data.modalities import ReadSpec
from gatdist.data.order import SampleOrder

__all__ = [
    "Dataset",
    "ReadSpec",
    "SampleOrder",
    "Shard",
    "open_dataset",
    "write_dataset",
    "write_manifest",
    "write_shard",
]
