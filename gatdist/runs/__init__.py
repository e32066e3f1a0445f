"""Run directories: configuration, attempts, checkpoints, and the networks in them."""

from gatdist.runs.changes import Change, ChangeLog
from gatdist.runs.checkpoint import GROUPS, Checkpoint, read_checkpoint, require_same_order
from gatdist.runs.checkpoints import Checkpoints, Retention
from gatdist.runs.directory import RunDirectory, adopted, read_config, read_lines, remember
from gatdist.runs.mapped import Mapped
from gatdist.runs.sharding import Layout, group_of, is_sharded, layout_of_each, shares
from gatdist.runs.state import Evaluations, require_saved_state
from gatdist.runs.trained import Sampler, TrainedRun, load_run, networks_with

__all__ = [
    "GROUPS",
    "Change",
    "ChangeLog",
    "Checkpoint",
    "Checkpoints",
    "Evaluations",
    "Layout",
    "Mapped",
    "Retention",
    "RunDirectory",
    "Sampler",
    "TrainedRun",
    "adopted",
    "group_of",
    "is_sharded",
    "layout_of_each",
    "load_run",
    "networks_with",
    "read_checkpoint",
    "read_config",
    "read_lines",
    "remember",
    "require_same_order",
    "require_saved_state",
    "shares",
]
