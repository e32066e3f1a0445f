"""Makes a data set of shards that others wrote: WebDataset's, img2dataset's.

``scan`` reads a tar from end to end, ``task`` makes the index of one shard, ``whole`` all of it.
"""

from gatdist.packing.indexing.task import Job, Record, Task, Worker
from gatdist.packing.indexing.whole import Indexing, Request, finish, prepare, preview

__all__ = [
    "Indexing",
    "Job",
    "Record",
    "Request",
    "Task",
    "Worker",
    "finish",
    "prepare",
    "preview",
]
