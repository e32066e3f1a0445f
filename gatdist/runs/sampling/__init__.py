"""Writes samples of a trained generator: to files, or into shards."""

from gatdist.runs.sampling.files import write_samples
from gatdist.runs.sampling.request import SampleRequest
from gatdist.runs.sampling.shards import write_shards

__all__ = ["SampleRequest", "write_samples", "write_shards"]
