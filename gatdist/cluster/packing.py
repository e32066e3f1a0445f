"""Runs the tasks of a packing on Ray Data, on one host or many."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatdist.cluster.connection import connected  # sets up what Ray's import needs

# isort: split
import ray.data

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.redirect import output_to_file, shown_on
from gatdist.common.errors import GatdistError, WorkerLostError, rebuilt
from gatdist.config import env_values
from gatdist.packing import Job, Record, Task, Worker
from gatdist.packing.processes import Report

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

# The address that asks for a Ray on this machine, which goes when the packing is done.
OWN = "local"
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

    Args:
        job: what all tasks share; its URLs must be reachable from all hosts.
        tasks: to do.
        address: of the cluster; ``local`` starts a Ray on this machine.
        workers: how many tasks at a time, at most; None for as many as there are cores.
        report: gets progress, a shard at a time.
        console: is kept apart from what Ray prints.

    Returns:
        The records of the tasks, in their order.

    Raises:
        ClusterError: nobody answers at the address.
        WorkerLostError: Ray gave up a task.
        GatdistError: what a task raised, of the same class.
    """
    log = Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"
    shared = job.model_dump_json()
    records: dict[int, Record] = {}
    with (
        output_to_file(log) as terminal,
        shown_on(console, terminal),
        connected("" if address == OWN else address, log, _OBJECT_STORE_BYTES),
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
            raise WorkerLostError(
                f"Ray gave up a shard ({error}). The whole story: {log}"
            ) from error
    shutil.rmtree(log.parent)
    return [records[task.number] for task in tasks]


def _do(row: dict[str, Any], bridge: Bridge) -> dict[str, Any]:
    """One row of Ray Data: a task in, what became of it out."""
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
