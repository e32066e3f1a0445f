"""Writes samples of a trained generator: to files, or into shards."""

from gatdist.sampling.files import write_samples
from gatdist.sampling.shards import write_shards
from gatdist.sampling.wanted import Wanted

__all__ = ["Wanted", "write_samples", "write_shards"]
