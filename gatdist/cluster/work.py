"""Does the tasks of packing and applying on Ray Data, on one host or many."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from gatdist.cluster.connection import connected, temporary_log  # sets up Ray's import

# isort: split
import ray.data
from pydantic import BaseModel

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.processes import output_to_file
from gatdist.common.errors import GatdistError, WorkerLostError, rebuilt
from gatdist.config import env_values
from gatdist.packing.processes import Report, ShardTask, Worker

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

_OBJECT_STORE_BYTES = 256 * 2**20


RecordT = TypeVar("RecordT", bound=BaseModel)


def do_all(
    worker_type: type[Worker[RecordT]],
    job: BaseModel,
    tasks: Sequence[ShardTask],
    address: str,
    workers: int | None,
    report: Report,
    console: Console | None,
    *,
    keeps_worker: bool = False,
) -> list[RecordT]:
    """Do tasks on a Ray cluster, each on one CPU core.

    Returns the records of the tasks, in their order.

    Args:
        worker_type: Does the tasks.
        job: What all tasks share. All hosts must reach its URLs.
        tasks: Tasks to do.
        address: Of the cluster; ``local`` starts Ray on this machine.
        workers: Largest number of concurrent tasks; None for one per core.
        report: Gets the progress of each task.
        console: Is kept apart from Ray's output.
        keeps_worker: Whether actors do the tasks, each with one worker for all of its tasks, which
            has loaded a network. They share the GPUs of the cluster, if there are any.

    Raises:
        ClusterError: the address does not answer.
        WorkerLostError: Ray gave up a task.
        GatdistError: what a task raised, of the same class.
    """
    shared = job.model_dump_json()
    records: dict[int, RecordT] = {}
    address = "" if address == "local" else address
    with (
        temporary_log() as log,
        output_to_file(log, console),
        connected(address, log, object_store_bytes=_OBJECT_STORE_BYTES),
    ):
        bridge = Bridge()
        name = worker_type.__module__, worker_type.__name__
        bridge.give({"job": shared, "environment": env_values(shared), "worker": name})
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"task": task.to_json()} for task in tasks]
        found = ray.data.from_items(rows, override_num_blocks=len(rows))
        if keeps_worker:
            actors, gpus = _actors(len(tasks), workers)
            results = found.map(
                _Actor,  # type: ignore[arg-type]
                fn_constructor_args=(bridge,),
                num_cpus=1,
                num_gpus=gpus,
                concurrency=actors,
            )
        else:
            results = found.map(
                lambda row: _Actor(bridge, keeps_worker=False)(row),
                num_cpus=1,
                concurrency=workers,
            )
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise rebuilt(row["error"], row["message"])
                record = worker_type.record_type.model_validate_json(row["record"])
                records[row["number"]] = record
                report(row["done"], row["found"])
        except ray.exceptions.RayError as error:
            raise WorkerLostError(f"Ray gave up a task ({error}). See {log}") from error
    return [records[task.number] for task in tasks]


def _actors(num_tasks: int, workers: int | None) -> tuple[int, float]:
    """Return the number of actors, and the GPUs of each."""
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cores, gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0.0)
    count = max(1, min(num_tasks, cores, workers or cores))
    return count, min(1.0, gpus / count)


class _Actor:
    """Does the tasks in rows of Ray Data, and returns rows of results."""

    def __init__(self, bridge: Bridge, *, keeps_worker: bool = True) -> None:
        self._bridge, self._keeps_worker = bridge, keeps_worker

    @cached_property
    def _worker(self) -> Any:
        given = self._bridge.given()
        module, name = given["worker"]
        worker_type = getattr(importlib.import_module(module), name)
        return worker_type(worker_type.job_type.model_validate_json(given["job"]))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        counts = [0, 0]

        def report(done: int, found: int) -> None:
            counts[0] += done
            counts[1] += found

        answer = {"number": 0, "error": "", "message": "", "record": ""}
        try:
            task = self._worker.task_type.from_json(row["task"])
            answer["number"] = task.number
            with ExitStack() as stack:
                worker = self._worker
                if not self._keeps_worker:
                    stack.enter_context(worker)
                answer["record"] = worker.do(task, report).model_dump_json()
        except GatdistError as error:
            answer |= {"error": type(error).__name__, "message": str(error)}
        return answer | {"done": counts[0], "found": counts[1]}
