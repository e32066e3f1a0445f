"""Run tasks in processes of this machine, without Ray.

A worker is a fresh interpreter that reads lines of JSON: its type, the job, and one task after the
other. Nothing is forked, and the user's own script does not run again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar

from pydantic import BaseModel

from gatdist.common.errors import GatdistError, WorkerLostError, rebuilt

_BOOT = (
    f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {__name__} as w; w.serve()"
)
_REPORT_S = 0.1

# Called with two numbers since the last call: what was done, and what an earlier start had done.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ShardTask:
    """The task of one shard, identified by its number; other fields are JSON values."""

    number: int

    def to_json(self) -> str:
        return json.dumps([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(*json.loads(text))


RecordT = TypeVar("RecordT", bound=BaseModel, covariant=True)


class Worker(Protocol[RecordT]):
    """Does tasks of one job. A context manager."""

    job_type: ClassVar[Any]  # a pydantic model
    task_type: ClassVar[Any]
    record_type: ClassVar[Any]  # a pydantic model

    def __init__(self, job: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def do(self, task: Any, report: Report) -> RecordT:
        pass


def do_all(
    worker_type: type[Worker[RecordT]],
    job: BaseModel,
    tasks: Sequence[ShardTask],
    workers: int,
    report: Report,
) -> list[RecordT]:
    """Run tasks in processes, or with one worker in this one; return their records in order.

    Raises WorkerLostError if a process died, and errors of tasks with their own class.
    """
    if not tasks:
        return []
    workers = min(workers, len(tasks))
    if workers == 1:
        with worker_type(job) as worker:
            return [worker.do(task, report) for task in tasks]
    records: dict[int, RecordT] = {}
    waiting, lock = iter(tasks), threading.Lock()

    def take() -> ShardTask | None:
        with lock:
            return next(waiting, None)

    def put(answer: dict[str, Any], task: ShardTask) -> bool:
        with lock:
            if "done" in answer:
                report(*answer["done"])
                return False
        if "error" in answer:
            raise rebuilt(*answer["error"])
        records[task.number] = worker_type.record_type.model_validate(answer["record"])
        return True

    def employ(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(worker_type.__module__, worker_type.__name__, file=process.stdin)
            print(job.model_dump_json(), file=process.stdin)
            while task := take():
                print(task.to_json(), file=process.stdin, flush=True)
                for line in process.stdout:
                    if put(json.loads(line), task):
                        break
                else:
                    raise BrokenPipeError
        except BrokenPipeError:
            raise _lost(process.wait()) from None

    with (
        _started(workers) as processes,
        ThreadPoolExecutor(workers, thread_name_prefix="gatdist-work") as pool,
    ):
        try:
            for employed in as_completed([pool.submit(employ, process) for process in processes]):
                employed.result()
        except BaseException:  # Ctrl-C, too
            for process in processes:
                process.kill()  # so that the threads end, which wait for answers
            raise
    return [records[task.number] for task in tasks]


def serve() -> None:
    """Run a worker: read job and tasks from standard input, write answers to standard output."""
    # Libraries may print: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        try:
            print(json.dumps(fields), file=answers, flush=True)
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    message = _Throttled(lambda done, found: answer(done=[done, found]))
    try:
        module, name = sys.stdin.readline().split()
        worker_type: Any = getattr(importlib.import_module(module), name)
        job = worker_type.job_type.model_validate_json(sys.stdin.readline())
        with worker_type(job) as worker:
            for line in sys.stdin:
                record = worker.do(worker_type.task_type.from_json(line), message.report)
                message.flush()
                answer(record=record.model_dump(mode="json"))
    except GatdistError as error:
        answer(error=[type(error).__name__, str(error)])


class _Throttled:
    def __init__(self, report: Report) -> None:
        self._report, self._done, self._found, self._last_s = report, 0, 0, time.monotonic()

    def report(self, done: int, found: int) -> None:
        self._done, self._found = self._done + done, self._found + found
        if time.monotonic() - self._last_s > _REPORT_S:
            self.flush()

    def flush(self) -> None:
        self._report(self._done, self._found)
        self._done, self._found, self._last_s = 0, 0, time.monotonic()


@contextmanager
def _started(count: int) -> Iterator[Sequence[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,  # so that Ctrl-C on the terminal is the parent's alone
        )
        for _ in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()


def _lost(status: int) -> GatdistError:
    if status < 0:
        reason = f"a process was killed by {signal.Signals(-status).name}"
        return WorkerLostError(
            f"{reason}; run the same command to resume. Was there enough memory?"
        )
    return GatdistError(f"a process failed with status {status}; its error is printed above")
