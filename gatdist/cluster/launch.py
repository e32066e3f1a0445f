"""Trains on a Ray cluster: launches the workers, and launches them again if it must.

A launch starts with a fixed number of workers. It continues without workers that are lost, with
others that join it, or, if ``cluster.after_loss`` is ``restart``, ends with them. A launch that has
ended is followed by another one, from the last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatdist.cluster.connection import (
    connected,
    log_file,
    require_temporary_folder,
)  # sets up Ray's import

# isort: split
import ray

from gatdist.cluster import policies, runtime_env
from gatdist.cluster.driver import Driver
from gatdist.cluster.nodes import Nodes, may_grow
from gatdist.cluster.processes import end_descendants, output_to_file
from gatdist.cluster.watch import Launch
from gatdist.common.errors import GatdistError, InterruptedRunError, WorkerLostError
from gatdist.config import Config
from gatdist.training.interrupts import Interrupts

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

# Ray takes a moment to release the resources of the last launch.
_RELEASE_S = 3.0


def fit(
    config: Config,
    sizes: Sequence[int],
    run_dir: str,
    console: Console | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """Train with one of the ``sizes``, here or on the cluster at ``cluster.address``.

    All workers must reach ``run_dir``, a URL or absolute path. Returns what
    :func:`gatdist.training.loop.run` returns.

    Raises:
        ClusterError: the address does not answer, or the cluster is too small.
        WorkerLostError: workers or their hosts died too often, or did not come back.
        InterruptedRunError: asked to stop while no worker was running.
        GatdistError: what the training loop raised, of the same class.
    """
    runtime = runtime_env.of_run(config)
    address = config.cluster.address
    require_temporary_folder(for_ray=not address)
    log = log_file(run_dir)
    if not address:  # before Ray is started for nothing
        has = policies.this_machine()
        needs = policies.needs_of(config.cluster, has)
        if policies.largest(sizes, policies.room_for(needs, [has])) is None:
            raise policies.too_small(config.cluster, sizes[0], needs, has)
        interrupts.before_leaving = end_descendants  # of Ray; a cluster that was joined stays
    with output_to_file(log, console), connected(address, log, runtime_env=runtime):
        interrupts.renew()  # Ray has taken over SIGTERM
        driver = Driver(config, sizes, run_dir, console, log, interrupts)
        interrupts.is_saved = lambda: False  # `Driver.interrupted` is polled instead
        return _train(driver)


def _train(driver: Driver) -> dict[str, Any]:
    """Launch workers until the run is over. See :func:`fit`."""
    reason = ""
    with driver.demand:
        while True:
            size = _await_room(driver)
            driver.launches += 1
            launch = Launch(driver, size)
            try:
                outcome = launch.train(reason)
            except GatdistError as error:
                reason = _recover(driver, error)
            else:
                if outcome["status"] != "interrupted" or driver.interrupted:
                    return outcome
                reason = launch.stop_reason


def _recover(driver: Driver, error: GatdistError) -> str:
    """Wait before the next launch and return its reason; or raise the error."""
    driver.disturbances += 1
    decision = driver.recovery.decide(error, driver.reached)
    if driver.interrupted or not decision.retries:
        raise _final(error, decision.reason, driver.log) from None
    delay = f" in {decision.delay_s:.0f} s" if decision.delay_s else ""
    driver.warn(f"{error}. Restarting from the last checkpoint{delay}")
    end = time.monotonic() + decision.delay_s
    while time.monotonic() < end and not driver.interrupted:
        time.sleep(policies.LOOK_S)
    if driver.interrupted:
        raise _final(error, "interrupted", driver.log) from None
    return str(error)


def _await_room(driver: Driver) -> int:
    """Return the number of workers to launch, once there is room for them.

    A run of a fixed size is relaunched at once: Ray Train prepares what it can while the hosts come
    back.
    """
    cluster, sizes, needs = driver.config.cluster, driver.sizes, driver.needs
    first = driver.launches == 0
    if len(sizes) == 1 and not first:
        return sizes[0]
    began, noted = time.monotonic(), False
    limit_s = cluster.wait_for_workers_s
    while True:
        driver.metrics.look()
        nodes, waited_s = Nodes.now(), time.monotonic() - began
        room, capacity = nodes.room(needs), nodes.capacity(needs)
        patience_s = 0.0 if first else _RELEASE_S
        size = policies.size_to_launch(sizes, room, capacity, waited_s, patience_s)
        if size is not None:
            return size
        if first and policies.largest(sizes, capacity) is None and not may_grow():
            has = ray.cluster_resources()  # type: ignore[no-untyped-call]
            raise policies.too_small(cluster, sizes[0], needs, has)
        if driver.interrupted:
            raise InterruptedRunError(
                f"interrupted while waiting for workers. The checkpoint at {driver.reached:,} "
                "samples is saved"
            )
        many = f"{sizes[0]} worker{'s' * (sizes[0] > 1)}"
        if waited_s > limit_s:
            raise WorkerLostError(
                f"no room for {many} after {limit_s:.0f} s (cluster.wait_for_workers_s). "
                f"{_RESUMES}. Ray's log: {driver.log}"
            )
        if not noted and waited_s > _RELEASE_S:
            noted = True
            driver.note(f"waiting for room for {many}")
            driver.demand.report()
        time.sleep(policies.LOOK_S)


_RESUMES = "The same command resumes from the last checkpoint"


def _final(error: GatdistError, reason: str, log: Path) -> GatdistError:
    """Return an error for the user, when there is no other launch."""
    if not isinstance(error, WorkerLostError):
        return error
    failed = f" ({reason})" if reason else ""
    return WorkerLostError(f"{error}{failed}. {_RESUMES}. Ray's log: {log}")
