"""Packs shards on Ray Data, on one host or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gatdist.cluster.connection import connected, temporary_log  # sets up Ray's import

# isort: split
import ray.data

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.processes import output_to_file
from gatdist.common.errors import GatdistError, WorkerLostError, rebuilt
from gatdist.config import env_values
from gatdist.packing import Job, Record, Task, Worker
from gatdist.packing.processes import Report

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

_OBJECT_STORE_BYTES = 256 * 2**20


def do_all(
    job: Job,
    tasks: Sequence[Task],
    address: str,
    workers: int | None,
    report: Report,
    console: Console | None,
) -> list[Record]:
    """Do tasks on a Ray cluster, each on one CPU core.

    Returns the records of the tasks, in their order.

    Args:
        job: What all tasks share. All hosts must reach its URLs.
        tasks: Tasks to do.
        address: Of the cluster; ``local`` starts Ray on this machine.
        workers: Largest number of concurrent tasks; None for one per core.
        report: Gets the progress of each shard.
        console: Is kept apart from Ray's output.

    Raises:
        ClusterError: the address does not answer.
        WorkerLostError: Ray gave up a task.
        GatdistError: what a task raised, of the same class.
    """
    shared = job.model_dump_json()
    records: dict[int, Record] = {}
    address = "" if address == "local" else address
    with (
        temporary_log() as log,
        output_to_file(log, console),
        connected(address, log, object_store_bytes=_OBJECT_STORE_BYTES),
    ):
        bridge = Bridge()
        bridge.give({"job": shared, "environment": env_values(shared)})
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"task": task.to_json()} for task in tasks]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            lambda row: _do(row, bridge), num_cpus=1, concurrency=workers
        )
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise rebuilt(row["error"], row["message"])
                records[row["number"]] = Record.model_validate_json(row["record"])
                report(row["packed"], row["found"])
        except ray.exceptions.RayError as error:
            raise WorkerLostError(f"Ray gave up a shard ({error}). See {log}") from error
    return [records[task.number] for task in tasks]


def _do(row: dict[str, Any], bridge: Bridge) -> dict[str, Any]:
    """Do the task in one row of Ray Data; returns the row of its result."""
    counts = [0, 0]

    def report(packed: int, found: int) -> None:
        counts[0] += packed
        counts[1] += found

    task = Task.from_json(row["task"])
    answer = {"number": task.number, "error": "", "message": "", "record": ""}
    try:
        with Worker(Job.model_validate_json(bridge.given()["job"])) as worker:
            answer["record"] = worker.do(task, report).model_dump_json()
    except GatdistError as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    return answer | {"packed": counts[0], "found": counts[1]}
