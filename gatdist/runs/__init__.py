"""What a run keeps on storage: its folder, its checkpoints, and the networks in them."""

from gatdist.runs.checkpoint import PARTS, Checkpoint, read_checkpoint, require_same_order
from gatdist.runs.checkpoints import Checkpoints, Retention
from gatdist.runs.directory import RunDirectory, read_config, read_lines
from gatdist.runs.evaluations import Evaluations
from gatdist.runs.ownership import adopted, remember
from gatdist.runs.saved_state import require_saved_state
from gatdist.runs.trained import Sampler, TrainedRun, load_run, networks_with

__all__ = [
    "PARTS",
    "Checkpoint",
    "Checkpoints",
    "Evaluations",
    "Retention",
    "RunDirectory",
    "Sampler",
    "TrainedRun",
    "adopted",
    "load_run",
    "networks_with",
    "read_checkpoint",
    "read_config",
    "read_lines",
    "remember",
    "require_same_order",
    "require_saved_state",
]
