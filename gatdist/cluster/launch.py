"""Trains on a Ray cluster: launches the workers, watches them, and launches them again.

One launch is one Ray Train run of a fixed number of workers. What lies between two launches, how
many workers the next one has, and whether there is one, is decided here: a failure, a notice of
preemption and a host that joins all end in the same place, where the workers are gone and their
last checkpoint says how far the run is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatdist.cluster.connection import (
    connected,
    log_file,
    require_temporary_folder,
)  # sets up what Ray's import needs

# isort: split
import ray
from ray.train.v2._internal.exceptions import RayTrainError

from gatdist.cluster import runtime_env
from gatdist.cluster.attempt import Attempt
from gatdist.cluster.autoscaler import Demand, may_grow
from gatdist.cluster.bridge import Bridge, DriverUpdate
from gatdist.cluster.metrics import Metrics
from gatdist.cluster.nodes import Nodes
from gatdist.cluster.preflight import token
from gatdist.cluster.processes import end_descendants
from gatdist.cluster.recovery import Recovery
from gatdist.cluster.redirect import output_to_file, shown_on
from gatdist.cluster.sizing import (
    Growth,
    largest,
    needs_of,
    of_this_machine,
    quiet_s,
    room_for,
    size_to_launch,
    too_small,
)
from gatdist.cluster.watch import Heartbeat, StragglerReport, straggler_report
from gatdist.common.errors import (
    GatdistError,
    InterruptedRunError,
    TrainingError,
    WorkerLostError,
    rebuilt,
    summary,
)
from gatdist.config import Config
from gatdist.storage import Store
from gatdist.training.interrupts import Interrupts

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

_LOOK_S = 0.2
_LOOK_AT_NODES_S = 1.0
# What a new start takes before one has been seen.
_USUAL_START_S = 15.0
_GROWTH_PATIENCE_S = 10.0
_STACKS_WAIT_S = 3.0
# Workers that make steps stop by themselves within this.
_PATIENCE_S = 1.5
# What a launch held that has just ended takes Ray a moment to give back.
_GIVE_BACK_S = 3.0
# Ours sends and stores little through Ray; its default takes a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 * 2**20


def fit(
    config: Config, run_dir: str, console: Console | None, interrupts: Interrupts
) -> dict[str, Any]:
    """Train with ``cluster.workers`` workers, here or on the cluster at ``cluster.address``.

    Args:
        config: of the run.
        run_dir: its folder: a URL, or an absolute path that all workers reach.
        console: shows progress; None shows nothing.
        interrupts: asks for the end.

    Returns:
        See :func:`gatdist.training.loop.run`.

    Raises:
        ClusterError: nobody answers at the address, or the cluster is too small.
        WorkerLostError: workers or their hosts died too often, or did not come back.
        InterruptedRunError: asked to stop while no worker was running.
        GatdistError: what the training loop raised, of the same class.
    """
    runtime = runtime_env.of_run(config)
    address = config.cluster.address
    require_temporary_folder(for_ray=not address)
    log = log_file(run_dir)
    if not address:  # before a Ray of our own is started for nothing
        has = of_this_machine()
        needs = needs_of(config, has)
        if largest(config.fitting_workers(), room_for(needs, [has])) is None:
            raise too_small(config, needs, has)
        # A Ray of our own goes with us; one that we joined stays.
        interrupts.before_leaving = end_descendants
    with (
        output_to_file(log) as terminal,
        shown_on(console, terminal),
        connected(address, log, _OBJECT_STORE_BYTES, runtime),
    ):
        interrupts.renew()  # Ray's library has taken SIGTERM
        return _Run(config, run_dir, console, log, interrupts).to_its_end()


class _Run:
    """One run, from launch to launch."""

    def __init__(
        self,
        config: Config,
        run_dir: str,
        console: Console | None,
        log: Path,
        interrupts: Interrupts,
    ) -> None:
        self.config, self.run_dir, self.log = config, run_dir, log
        self.console = console
        self.sizes = config.fitting_workers()
        joined = bool(config.cluster.address)  # a Ray of our own has no autoscaler
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.needs = needs_of(config, has, grows=joined and may_grow())
        self.bridge = Bridge()
        self.metrics = Metrics(config, run_dir)
        self.recovery = Recovery(config.cluster.max_failures)
        self.launches = 0
        self.reached = 0  # samples seen by the newest checkpoint
        self.left_s = 0.0  # that the run will take as it is; 0 where that is not known
        self.start_s = _USUAL_START_S
        self._interrupts = interrupts
        self.asked = ""  # why the driver itself has asked the workers to stop
        self.began = time.monotonic()
        self.disturbances = 0  # failures and notices
        elastic = len(self.sizes) > 1
        self.demand = Demand(self.needs, self.sizes[-1] * joined, at_once=joined and elastic)

    def to_its_end(self) -> dict[str, Any]:
        """Launch workers until the run is over. See :func:`fit`."""
        # Ray Train takes over SIGINT if it runs in the main thread; there, it is ours.
        reason, first = "", True
        self._interrupts.is_saved = lambda: False  # here, signals are looked for
        with self.demand:
            while True:
                size = self._await_room(first)
                try:
                    outcome = self._launch(size, reason)
                except GatdistError as error:
                    reason = self._after(error)
                else:
                    if outcome["status"] != "interrupted" or self.interrupted:
                        return outcome
                    reason = self.asked
                first = False

    def show(self, kind: str, fields: dict[str, Any]) -> None:
        """Tell people of an event."""
        self.metrics.event(kind, fields)
        if kind == "checkpoint":
            self.reached = fields["samples_seen"]
        if kind == "log":
            left = fields["total_samples"] - fields["samples_seen"]
            self.left_s = left / fields["throughput/samples_per_s"]
        if kind == "done" and fields["status"] == "interrupted" and not self.interrupted:
            return  # a pause between two launches, which was told already
        if self.console:
            self.console.event(kind, fields)

    def _note(self, message: str) -> None:
        self.show("note", {"message": message})

    @property
    def interrupted(self) -> bool:
        """Whether somebody has asked for the end."""
        return self._interrupts.requested()

    def _after(self, error: GatdistError) -> str:
        """Wait before the next launch, and return its reason; or raise the error."""
        self.disturbances += 1
        decision = self.recovery.judge(error, self.reached)
        if self.interrupted or not decision.goes_on:
            raise _final(error, decision.why_not, self.log) from None
        message = f"{error}; starting again from the last checkpoint"
        if decision.delay_s:
            message += f" in {decision.delay_s:.0f} s"
        self.show("warning", {"message": message})
        self._sleep(decision.delay_s)
        if self.interrupted:
            raise _final(error, "interrupted", self.log) from None
        return str(error)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.interrupted:
            time.sleep(_LOOK_S)

    def _await_room(self, first: bool) -> int:
        """The number of workers to launch, once there is room for it.

        A run of a fixed size that has trained before is launched at once: while its hosts are
        coming back, Ray Train prepares what it can.
        """
        if len(self.sizes) == 1 and not first:
            return self.sizes[0]
        began, message = time.monotonic(), False
        while True:
            self.metrics.look()
            nodes, waited_s = Nodes.now(), time.monotonic() - began
            room, capacity = nodes.room(self.needs), nodes.capacity(self.needs)
            patience_s = 0.0 if first else _GIVE_BACK_S
            size = size_to_launch(self.sizes, room, capacity, waited_s, patience_s)
            if size is not None:
                return size
            if first and largest(self.sizes, capacity) is None and not may_grow():
                has = ray.cluster_resources()  # type: ignore[no-untyped-call]
                raise too_small(self.config, self.needs, has)
            if self.interrupted:
                raise InterruptedRunError(
                    f"interrupted while waiting for workers; the checkpoint at {self.reached:,} "
                    "samples is safe"
                )
            if waited_s > self.config.cluster.wait_for_workers_s:
                raise WorkerLostError(
                    f"there is no room for {self.sizes[0]} workers after "
                    f"{self.config.cluster.wait_for_workers_s:.0f} s "
                    "(cluster.wait_for_workers_s); the same command goes on from the last "
                    f"checkpoint. Ray's log: {self.log}"
                )
            if not message and waited_s > _GIVE_BACK_S:
                message = True
                many = f"{self.sizes[0]} worker{'s' * (self.sizes[0] > 1)}"
                self._note(f"waiting for room for {many}")
                self.demand.report()
            time.sleep(_LOOK_S)

    def _launch(self, size: int, reason: str) -> dict[str, Any]:
        """Launch workers and watch them to their end. Returns what the training loop returned."""
        self.launches += 1
        self.bridge = self.bridge.begin(self.launches)
        self.metrics.launch()
        self.asked, self.left_s = "", 0.0
        # Ray Train's own records, on which nothing depends.
        folder = tempfile.TemporaryDirectory(prefix="gatdist-ray-", ignore_cleanup_errors=True)
        with folder as records, ExitStack() as start:
            left = start.enter_context(token(self.config, self.run_dir))
            self.bridge.give(runtime_env.at_start(self.config, self.run_dir, left))
            attempt = Attempt(
                self.config,
                num_workers=size,
                needs=self.needs,
                bridge=self.bridge,
                records=records,
                reason=reason,
                first=self.launches == 1,
            )
            attempt.start()
            watch = _Watch(self, size)
            while attempt.is_alive():
                attempt.join(_LOOK_S)
                if self.interrupted:  # a signal's handler had better not ask Ray
                    self.bridge.order("stop")
                try:
                    update = self.bridge.take()
                except WorkerLostError:
                    attempt.abort(self.bridge.controller)
                    self.bridge = Bridge()
                    raise
                self.metrics.look(update.heartbeats)
                for kind, fields in update.events:
                    self.show(kind, fields)
                if watch.moves:
                    start.close()
                found = watch.look(update)
                if found or watch.can_end(update):
                    # Those who have asked for the end do not wait for that of Ray Train.
                    attempt.abort(
                        update.controller, waits=found is not None or not self.interrupted
                    )
                    if update.outcome is None and found:
                        raise found
                    if update.outcome is None:
                        return self._ended_in_between(update)
            update = self.bridge.take()
        for kind, fields in update.events:
            self.show(kind, fields)
        # All that was done is safe: a host that was given notice goes as soon as it is idle.
        if update.outcome is not None:
            return update.outcome
        if update.failure is not None:
            raise _reported(update)
        attempt.release()  # a controller that died gave nothing back
        raise _explained(attempt.error, update.heartbeats, self.log)

    def _ended_in_between(self, update: DriverUpdate) -> dict[str, Any]:
        """The outcome of workers that were ended where there was nothing to save."""
        seen = update.heartbeats[0].samples_seen if update.heartbeats else self.reached
        outcome = {"status": "interrupted", "reason": "asked to stop", "samples_seen": seen}
        return outcome | {"metrics": {}}


class _Watch:
    """Looks after the workers of one launch; what it sees is judged by policies."""

    def __init__(self, run: _Run, size: int) -> None:
        self.run, self.size, self.cluster = run, size, run.config.cluster
        self.began = self.looked = time.monotonic()
        self.growth = Growth(_GROWTH_PATIENCE_S)
        self.moves = False
        self.late_since: float | None = None
        self.straggler_reported = False
        self.stacks_asked = 0
        self.saved_since: float | None = None

    def can_end(self, update: DriverUpdate) -> bool:
        """Whether the workers, asked to stop, may be ended where they are: nothing is to be saved.

        So it is while they start, and while they evaluate what is already saved. Workers that make
        steps stop by themselves.
        """
        now = time.monotonic()
        starts = not update.heartbeats
        saved = starts or update.outcome is not None or update.heartbeats[0].is_saved
        if not (self.run.interrupted or self.run.asked) or not saved:
            self.saved_since = None
            return False
        self.saved_since = self.saved_since or now
        return now - self.saved_since > _PATIENCE_S

    def look(self, update: DriverUpdate) -> GatdistError | None:
        """Ask the workers for what is called for; returns why they must be ended, or None."""
        now = time.monotonic()
        if update.failure is not None:
            # The others would wait for the one that failed; Ray need not find that out.
            return _reported(update) if update.controller is not None else None
        if not self.moves and len(update.heartbeats) == self.size:
            self.moves = True
            self.run.start_s = now - self.began
        if error := self._judge_stragglers(update, now):
            return error
        if now - self.looked > _LOOK_AT_NODES_S:
            self.looked = now
            return self._judge_nodes(update, now)
        return None

    def _judge_stragglers(self, update: DriverUpdate, now: float) -> GatdistError | None:
        if not self.moves:
            waited = now - self.began
            limit = self.cluster.startup_timeout_s + self.cluster.wait_for_workers_s
            if waited < limit or update.controller is None:
                return None
            return WorkerLostError(f"the {self.size} workers did not start within {waited:.0f} s")
        cluster = self.cluster
        lengthy_s = max(0.0, cluster.startup_timeout_s - cluster.heartbeat_timeout_s)
        late = straggler_report(update.heartbeats, cluster.straggler_warn_s, lengthy_s)
        if late is None:
            self.late_since, self.straggler_reported = None, False
            return None
        if self.late_since is None:
            self.late_since = now
            self.stacks_asked += 1
            self.run.bridge.order("stacks", self.stacks_asked)
            return None
        answering = sum(
            heartbeat.silent_s < self.cluster.straggler_warn_s for heartbeat in update.heartbeats
        )
        if len(update.stacks) < answering and now - self.late_since < _STACKS_WAIT_S:
            return None
        if not self.straggler_reported:
            self.straggler_reported = True
            file = self._write_stacks(update, late)
            self.run.show("warning", {"message": f"{late.message}; stacks: {file}"})
        if late.for_s < self.cluster.heartbeat_timeout_s:
            return None
        return WorkerLostError(f"{late.message}, more than cluster.heartbeat_timeout_s")

    def _write_stacks(self, update: DriverUpdate, late: StragglerReport) -> str:
        store = Store(self.run.run_dir, self.run.config.run.storage_options)
        name = f"logs/stacks-{self.run.launches:03d}-{self.stacks_asked:02d}.txt"
        message = {heartbeat.rank: str(heartbeat) for heartbeat in update.heartbeats}
        parts = [
            late.message,
            *(f"== {message[rank]}\n{text}" for rank, text in update.stacks.items()),
        ]
        store.publish(name, "\n\n".join(parts).encode())
        return f"{store.url}/{name}"

    def _judge_nodes(self, update: DriverUpdate, now: float) -> GatdistError | None:
        """Heed hosts that have died, are about to go, or have joined."""
        used = {heartbeat.node: heartbeat.host for heartbeat in update.heartbeats}
        nodes = Nodes.now()
        if lost := nodes.lost(used):
            hosts = ", ".join(sorted(used[node] for node in lost))
            return WorkerLostError(f"lost {hosts}: Ray reaches it no more")
        if self.run.interrupted or self.run.asked:
            return None
        left_s = nodes.leaving(used)
        if left_s is not None:
            hosts = ", ".join(sorted(used[node] for node in used if node in nodes.draining))
            soon = f"in {left_s:.0f} s" if left_s < float("inf") else "soon"
            self.run.disturbances += 1
            self._ask_to_stop(f"{hosts} will be taken away {soon}")
            return None
        later = largest(self.run.sizes, self.size + nodes.room(self.run.needs))
        left_s = min(self.run.left_s, quiet_s(now - self.run.began, self.run.disturbances))
        if self.growth.decide(self.size, later, left_s, self.run.start_s, now):
            self._ask_to_stop(f"room for {later} workers instead of {self.size}")
        return None

    def _ask_to_stop(self, why: str) -> None:
        self.run.asked = why
        self.run._note(f"{why}: going on after a checkpoint")
        self.run.bridge.order("stop")


def _final(error: GatdistError, why_not: str, log: Path) -> GatdistError:
    """An error as the user is told it at the end."""
    if not isinstance(error, WorkerLostError):
        return error
    failed = f" ({why_not})" if why_not else ""
    message = (
        f"{error}{failed}; the same command goes on from the last checkpoint. Ray's log: {log}"
    )
    return WorkerLostError(message)


def _reported(update: DriverUpdate) -> GatdistError:
    """What a worker told; where it has only felt that others are gone, which they are."""
    assert update.failure is not None
    error = rebuilt(*update.failure)
    if isinstance(error, WorkerLostError):
        dead = Nodes.dead_actors([heartbeat.actor for heartbeat in update.heartbeats])
        names = [str(heartbeat) for heartbeat in update.heartbeats if heartbeat.actor in dead]
        if names:
            return WorkerLostError(f"{' and '.join(names)} died")
    return error


def _explained(
    error: BaseException | None, heartbeats: Sequence[Heartbeat], log: Path
) -> GatdistError:
    """What Ray saw go wrong, for people."""
    failures = getattr(error, "worker_failures", None) or {}
    names = {heartbeat.rank: str(heartbeat) for heartbeat in heartbeats}
    for rank, cause in sorted(failures.items()):
        if isinstance(cause, ray.exceptions.RayActorError | RayTrainError):
            return WorkerLostError(f"{names.get(rank, f'worker {rank}')} died")
        _log(f"worker {rank} failed:\n{cause}")
        return TrainingError(f"worker {rank} failed: {summary(cause)}. The whole story: {log}")
    if error is None:
        return WorkerLostError("the workers ended without an outcome")
    cause = getattr(error, "controller_failure", error)
    _log(f"the workers failed:\n{cause}")
    if names:
        return WorkerLostError(f"Ray Train failed ({summary(cause)})")
    return WorkerLostError(f"the workers did not start ({summary(cause)})")


def _log(text: str) -> None:
    """Write to Ray's log, where standard error goes while it runs."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
