"""Packs files, archives, tables and texts on any storage into shards.

``sources`` lists what there is, ``plan`` says which sample goes where, ``task`` packs a shard;
``pack`` is the whole of it.
"""

from gatdist.data.packing.pack import Packing, Request, finish, prepare, preview
from gatdist.data.packing.plan import Task
from gatdist.data.packing.recipe import Recipe, read_recipe
from gatdist.data.packing.sources import KINDS, Asked
from gatdist.data.packing.sources.tables import is_list
from gatdist.data.packing.task import Job, Record, Worker

__all__ = [
    "KINDS",
    "Asked",
    "Job",
    "Packing",
    "Recipe",
    "Record",
    "Request",
    "Task",
    "Worker",
    "finish",
    "is_list",
    "prepare",
    "preview",
    "read_recipe",
]
