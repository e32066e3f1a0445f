"""Does tasks in processes of this machine, without Ray.

A worker is a fresh interpreter that is given lines of JSON: the job, then one task after the other.
Nothing is forked, and the user's own script is not run again. A worker whose parent is gone ends as
soon as it would tell it something.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any

from gatdist.data.packing.plan import Task
from gatdist.data.packing.task import Job, Record, Tell, Worker
from gatdist.errors import GatdistError, WorkerLostError, rebuilt

_BOOT = (
    f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {__name__} as w; w.serve()"
)
_TELL_S = 0.1


def do_all(job: Job, tasks: Sequence[Task], workers: int, tell: Tell) -> list[Record]:
    """Do tasks in this process, or in several others.

    Args:
        job: what all tasks share.
        tasks: to do.
        workers: how many processes; with 1, this one.
        tell: gets progress; see :data:`~gatdist.data.packing.task.Tell`.

    Returns:
        The records of the tasks, in their order.

    Raises:
        WorkerLostError: a process died.
        GatdistError: what a task raised, of the same class.
    """
    workers = min(workers, len(tasks))
    if workers == 1:
        with Worker(job) as worker:
            return [worker.do(task, tell) for task in tasks]
    records: dict[int, Record] = {}
    waiting, lock = iter(tasks), threading.Lock()

    def take() -> Task | None:
        with lock:
            return next(waiting, None)

    def put(answer: dict[str, Any], task: Task) -> bool:
        """Whether the task is done."""
        with lock:
            if "done" in answer:
                tell(*answer["done"])
                return False
        if "error" in answer:
            raise rebuilt(*answer["error"])
        records[task.number] = Record.model_validate(answer["record"])
        return True

    def employ(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
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
        ThreadPoolExecutor(workers, thread_name_prefix="gatdist-pack") as pool,
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
    """What a worker runs: a job and tasks come on standard input, answers go to standard output."""
    # What libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        try:
            print(json.dumps(fields), file=answers, flush=True)
        except BrokenPipeError:  # the parent is gone; nothing is to be told or tidied up
            os._exit(1)

    told = _Throttled(lambda packed, found: answer(done=[packed, found]))
    try:
        with Worker(Job.model_validate_json(sys.stdin.readline())) as worker:
            for line in sys.stdin:
                record = worker.do(Task.from_json(line), told.tell)
                told.flush()
                answer(record=record.model_dump(mode="json"))
    except GatdistError as error:
        answer(error=[type(error).__name__, str(error)])


class _Throttled:
    """Adds up what is told, and passes it on ten times a second."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._packed, self._found, self._last_s = tell, 0, 0, time.monotonic()

    def tell(self, packed: int, found: int) -> None:
        self._packed, self._found = self._packed + packed, self._found + found
        if time.monotonic() - self._last_s > _TELL_S:
            self.flush()

    def flush(self) -> None:
        self._tell(self._packed, self._found)
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
        reason = f"a packing process was killed by {signal.Signals(-status).name}"
        return WorkerLostError(f"{reason}; the same command goes on. Was there memory enough?")
    return GatdistError(f"a packing process failed with status {status}; its error stands above")
