"""Apply a generator with inputs to files: plan them, and generate from each."""

from gatdist.runs.applying.plan import Plan, finish, prepare, summary
from gatdist.runs.applying.work import Job, Record, Request, Task, Worker

__all__ = ["Job", "Plan", "Record", "Request", "Task", "Worker", "finish", "prepare", "summary"]
