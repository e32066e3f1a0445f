"""Make a data set of existing shards, such as WebDataset's and img2dataset's."""

from gatdist.packing.indexing.plan import Indexing, finish, prepare, preview
from gatdist.packing.indexing.task import Job, Record, Request, Task, Worker

__all__ = ["Indexing", "Job", "Record", "Request", "Task", "Worker", "finish", "prepare", "preview"]
