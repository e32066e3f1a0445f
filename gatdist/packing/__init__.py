"""Pack files, archives, tables and texts on any storage into shards; index existing shards."""

from gatdist.packing.entries import Selection
from gatdist.packing.fetch import read_origins
from gatdist.packing.pack import Packing, finish, prepare, preview
from gatdist.packing.recipe import Recipe, read_recipe
from gatdist.packing.sources import KINDS
from gatdist.packing.sources.fields import read_fields
from gatdist.packing.sources.tables import is_list
from gatdist.packing.task import Job, Record, Request, Task, Worker

__all__ = [
    "KINDS",
    "Job",
    "Packing",
    "Recipe",
    "Record",
    "Request",
    "Selection",
    "Task",
    "Worker",
    "finish",
    "is_list",
    "prepare",
    "preview",
    "read_fields",
    "read_origins",
    "read_recipe",
]
