"""Does tasks in processes of this machine, without Ray: a shard is packed, indexed or verified.

A worker is a fresh interpreter that is given lines of JSON: whose work it does, the job, then one
task after the other. Nothing is forked, and the user's own script is not run again. A worker whose
parent is gone ends as soon as it would tell it something.
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
from typing import Any, ClassVar, Protocol, Self, TypeVar

from pydantic import BaseModel

from gatdist.common.errors import GatdistError, WorkerLostError, rebuilt

_BOOT = (
    f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {__name__} as w; w.serve()"
)
_REPORT_S = 0.1

# Gets how many samples (or bytes, or what else is counted) were done, and how many were found done
# already, since it was last called.
Report = Callable[[int, int], None]


class Task(Protocol):
    """What one worker does in one go. Tasks of a job have different numbers."""

    @property
    def number(self) -> int:
        """Its own."""

    def to_json(self) -> str:
        """On one line, for another process."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote."""


RecordT = TypeVar("RecordT", bound=BaseModel, covariant=True)


class Worker(Protocol[RecordT]):
    """Does tasks of one job. A context manager."""

    job_type: ClassVar[Any]  # a pydantic model
    task_type: ClassVar[Any]
    record_type: ClassVar[Any]  # a pydantic model

    def __init__(self, job: Any) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def do(self, task: Any, report: Report) -> RecordT:
        """Do a task, and tell now and then how far it is."""


def do_all(
    worker_type: type[Worker[RecordT]],
    job: BaseModel,
    tasks: Sequence[Task],
    workers: int,
    report: Report,
) -> list[RecordT]:
    """Do tasks in this process, or in several others.

    Args:
        worker_type: the class of the workers.
        job: what all tasks share.
        tasks: to do.
        workers: how many processes; with 1, this one.
        report: gets progress.

    Returns:
        The records of the tasks, in their order.

    Raises:
        WorkerLostError: a process died.
        GatdistError: what a task raised, of the same class.
    """
    workers = min(workers, len(tasks))
    if workers == 1:
        with worker_type(job) as worker:
            return [worker.do(task, report) for task in tasks]
    records: dict[int, RecordT] = {}

    waiting, lock = iter(tasks), threading.Lock()

    def take() -> Task | None:
        with lock:
            return next(waiting, None)

    def put(answer: dict[str, Any], task: Task) -> bool:
        """Whether the task is done."""
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
    """What a worker runs: job and tasks come on standard input, answers go to standard output."""
    # What libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        try:
            print(json.dumps(fields), file=answers, flush=True)
        except BrokenPipeError:  # the parent is gone; nothing is to be told or tidied up
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
    """Adds up what is told, and passes it on ten times a second."""

    def __init__(self, report: Report) -> None:
        self._report, self._packed, self._found, self._last_s = report, 0, 0, time.monotonic()

    def report(self, packed: int, found: int) -> None:
        self._packed, self._found = self._packed + packed, self._found + found
        if time.monotonic() - self._last_s > _REPORT_S:
            self.flush()

    def flush(self) -> None:
        self._report(self._packed, self._found)
        self._packed, self._found, self._last_s = 0, 0, time.monotonic()


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
        return WorkerLostError(f"{reason}; the same command goes on. Was there memory enough?")
    return GatdistError(f"a process failed with status {status}; its error stands above")
