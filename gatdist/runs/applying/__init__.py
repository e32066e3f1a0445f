"""Apply a generator with inputs to files: plan them, and generate from each."""

from gatdist.runs.applying.plan import Plan, Request, finish, prepare, summary
from gatdist.runs.applying.work import Job, Record, Task, Worker

__all__ = ["Job", "Plan", "Record", "Request", "Task", "Worker", "finish", "prepare", "summary"]
