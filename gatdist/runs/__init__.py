"""What a run keeps on storage: its folder, its checkpoints, and the generator in them."""

from gatdist.runs.checkpoint import Checkpoint, read_checkpoint
from gatdist.runs.checkpoints import Checkpoints, Retention
from gatdist.runs.directory import RunDirectory, read_config, read_lines
from gatdist.runs.generator import Sampler, TrainedGenerator, load_generator

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Retention",
    "RunDirectory",
    "Sampler",
    "TrainedGenerator",
    "load_generator",
    "read_checkpoint",
    "read_config",
    "read_lines",
]
