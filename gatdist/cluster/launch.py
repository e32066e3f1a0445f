"""Trains on a Ray cluster: launches the workers, watches them, and launches them again.

One launch is one Ray Train run of a fixed number of workers. A failure, a preemption notice and a
host that joins all end a launch; its last checkpoint says how far the run is. The driver then
decides whether there is another launch, and with how many workers.
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
)  # sets up Ray's import

# isort: split
import ray
from ray.train.v2._internal.exceptions import RayTrainError

from gatdist.cluster import policies, runtime_env
from gatdist.cluster.attempt import Attempt
from gatdist.cluster.bridge import Bridge, DriverUpdate, Event
from gatdist.cluster.metrics import Metrics
from gatdist.cluster.nodes import Demand, Nodes, dead_actors, may_grow
from gatdist.cluster.preflight import marker
from gatdist.cluster.processes import end_descendants, output_to_file
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
# Assumed duration of a restart before one was measured.
_USUAL_START_S = 15.0
_GROWTH_PATIENCE_S = 10.0
_STACKS_WAIT_S = 3.0
# Training workers stop by themselves within this.
_PATIENCE_S = 1.5
# Ray Train ends within this, once the workers have.
_END_S = 10.0
# Ray takes a moment to release the resources of the last launch.
_RELEASE_S = 3.0


def fit(
    config: Config,
    sizes: list[int],
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
        return _Run(config, sizes, run_dir, console, log, interrupts).train()


class _Run:
    """The driver's state of a run, from launch to launch."""

    def __init__(
        self,
        config: Config,
        sizes: list[int],
        run_dir: str,
        console: Console | None,
        log: Path,
        interrupts: Interrupts,
    ) -> None:
        self.config, self.run_dir, self.log = config, run_dir, log
        self._console, self._interrupts = console, interrupts
        self.sizes = sizes
        joined = bool(config.cluster.address)  # a Ray that was started here has no autoscaler
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.needs = policies.needs_of(config.cluster, has, grows=joined and may_grow())
        self.bridge = Bridge()
        self.metrics = Metrics(config, run_dir)
        self.recovery = policies.Recovery(config.cluster.max_failures)
        elastic = len(self.sizes) > 1
        self._demand = Demand(self.needs, self.sizes[-1] * joined, at_once=joined and elastic)
        self.began = time.monotonic()
        self.launches = 0
        self.reached = 0  # samples seen by the newest checkpoint
        self.disturbances = 0  # failures and preemption notices
        self.left_s = 0.0  # seconds to the end at the present speed; 0 if unknown
        self.start_s = _USUAL_START_S  # seconds that the last start took

    def train(self) -> dict[str, Any]:
        """Launch workers until the run is over. See :func:`fit`."""
        self._interrupts.is_saved = lambda: False  # `interrupted` is polled instead
        reason = ""
        with self._demand:
            while True:
                size = self._await_room()
                self.launches += 1
                launch = _Launch(self, size)
                try:
                    outcome = launch.train(reason)
                except GatdistError as error:
                    reason = self._recover(error)
                else:
                    if outcome["status"] != "interrupted" or self.interrupted:
                        return outcome
                    reason = launch.stop_reason

    @property
    def interrupted(self) -> bool:
        return self._interrupts.requested()

    def show(self, kind: str, fields: dict[str, Any]) -> None:
        """Show an event on the console and in the metrics."""
        self.metrics.event(kind, fields)
        if kind == "checkpoint":
            self.reached = fields["samples_seen"]
        if kind == "log":
            left = fields["total_samples"] - fields["samples_seen"]
            self.left_s = left / fields["throughput/samples_per_s"]
        if kind == "done" and fields["status"] == "interrupted" and not self.interrupted:
            return  # a pause between two launches, which was shown already
        if self._console:
            self._console.event(kind, fields)

    def show_all(self, events: Sequence[Event]) -> None:
        for kind, fields in events:
            self.show(kind, fields)

    def note(self, message: str) -> None:
        self.show("note", {"message": message})

    def _recover(self, error: GatdistError) -> str:
        """Wait before the next launch and return its reason; or raise the error."""
        self.disturbances += 1
        decision = self.recovery.decide(error, self.reached)
        if self.interrupted or not decision.retries:
            raise _final(error, decision.reason, self.log) from None
        delay = f" in {decision.delay_s:.0f} s" if decision.delay_s else ""
        message = f"{error}. Restarting from the last checkpoint{delay}"
        self.show("warning", {"message": message})
        end = time.monotonic() + decision.delay_s
        while time.monotonic() < end and not self.interrupted:
            time.sleep(_LOOK_S)
        if self.interrupted:
            raise _final(error, "interrupted", self.log) from None
        return str(error)

    def _await_room(self) -> int:
        """Return the number of workers to launch, once there is room for them.

        A run of a fixed size is relaunched at once: Ray Train prepares what it can while the hosts
        come back.
        """
        first = self.launches == 0
        if len(self.sizes) == 1 and not first:
            return self.sizes[0]
        began, noted = time.monotonic(), False
        limit_s = self.config.cluster.wait_for_workers_s
        while True:
            self.metrics.look()
            nodes, waited_s = Nodes.now(), time.monotonic() - began
            room, capacity = nodes.room(self.needs), nodes.capacity(self.needs)
            patience_s = 0.0 if first else _RELEASE_S
            size = policies.size_to_launch(self.sizes, room, capacity, waited_s, patience_s)
            if size is not None:
                return size
            if first and policies.largest(self.sizes, capacity) is None and not may_grow():
                has = ray.cluster_resources()  # type: ignore[no-untyped-call]
                raise policies.too_small(self.config.cluster, self.sizes[0], self.needs, has)
            if self.interrupted:
                raise InterruptedRunError(
                    f"interrupted while waiting for workers. The checkpoint at {self.reached:,} "
                    "samples is saved"
                )
            many = f"{self.sizes[0]} worker{'s' * (self.sizes[0] > 1)}"
            if waited_s > limit_s:
                raise WorkerLostError(
                    f"no room for {many} after {limit_s:.0f} s (cluster.wait_for_workers_s). "
                    f"{_RESUMES}. Ray's log: {self.log}"
                )
            if not noted and waited_s > _RELEASE_S:
                noted = True
                self.note(f"waiting for room for {many}")
                self._demand.report()
            time.sleep(_LOOK_S)


class _Launch:
    """One launch of ``size`` workers."""

    def __init__(self, run: _Run, size: int) -> None:
        self._run, self._size, self._cluster = run, size, run.config.cluster
        self.stop_reason = ""  # why the driver has asked the workers to stop
        self._began = self._looked = time.monotonic()
        self._has_started = False  # all workers have sent heartbeats
        self._growth = policies.Growth(_GROWTH_PATIENCE_S)
        self._late_since: float | None = None
        self._straggler_reported = False
        self._stacks_requested = 0
        self._between_since: float | None = None
        self._over_since: float | None = None
        self._saved_since: float | None = None

    def train(self, reason: str) -> dict[str, Any]:
        """Start the workers, watch them to their end, and return the training loop's outcome."""
        run = self._run
        run.bridge = run.bridge.begin(run.launches)
        run.metrics.launch()
        run.left_s = 0.0
        folder = tempfile.TemporaryDirectory(prefix="gatdist-ray-", ignore_cleanup_errors=True)
        with folder as records, ExitStack() as start:
            left = start.enter_context(marker(run.run_dir, run.config.run.storage_options))
            run.bridge.give(runtime_env.at_start(run.config, run.run_dir, left))
            attempt = Attempt(
                run.config,
                num_workers=self._size,
                sizes=self._sizes_to_continue(),
                needs=run.needs,
                bridge=run.bridge,
                records=records,
                reason=reason,
                first=run.launches == 1,
            )
            attempt.start()
            while attempt.is_alive():
                attempt.join(_LOOK_S)
                update = self._take(attempt)
                if self._has_started and self._cluster.after_loss == "restart":
                    start.close()  # deletes the marker; replacements look for it
                error = self._check(update)
                if not error and not self._can_end(update) and not self._hangs(update):
                    continue
                # Users who have asked for the end do not wait for Ray Train's.
                attempt.abort(update.controller, waits=error is not None or not run.interrupted)
                if update.outcome is None:
                    if error:
                        raise error
                    return self._interrupted(update)
            update = run.bridge.take()
        run.show_all(update.events)
        # A host with a preemption notice leaves as soon as it is idle, which is no failure now.
        if update.outcome is not None:
            return update.outcome
        if update.failure is not None:
            raise _reported(update)
        attempt.release()  # a controller that died has released nothing
        raise _explained(attempt.error, update.heartbeats, run.log)

    def _sizes_to_continue(self) -> tuple[int, ...]:
        """Return the numbers of workers that may continue this launch; none if a loss ends it."""
        if self._cluster.after_loss == "restart":
            return ()
        return tuple(size for size in self._run.sizes if size <= self._size)

    def _take(self, attempt: Attempt) -> DriverUpdate:
        """Send orders to the workers, and show what they report."""
        run = self._run
        if run.interrupted:  # a signal handler must not call Ray
            run.bridge.order("stop")
        try:
            update = run.bridge.take()
        except WorkerLostError:
            attempt.abort(run.bridge.controller)
            run.bridge = Bridge()
            raise
        run.metrics.look(update.heartbeats)
        run.show_all(update.events)
        return update

    def _can_end(self, update: DriverUpdate) -> bool:
        """Whether workers that were asked to stop may be killed, since nothing is to be saved.

        So it is while they start, and while they evaluate after a checkpoint. Others stop by
        themselves.
        """
        starts = not update.heartbeats
        saved = starts or update.outcome is not None or update.heartbeats[0].is_saved
        if not (self._run.interrupted or self.stop_reason) or not saved:
            self._saved_since = None
            return False
        now = time.monotonic()
        self._saved_since = self._saved_since or now
        return now - self._saved_since > _PATIENCE_S

    def _hangs(self, update: DriverUpdate) -> bool:
        """Whether Ray Train is still busy, such as with a replacement, though the run is over."""
        now = time.monotonic()
        if update.outcome is None:
            return False
        self._over_since = self._over_since or now
        return now - self._over_since > _END_S

    def _interrupted(self, update: DriverUpdate) -> dict[str, Any]:
        """Return the outcome of workers that were killed when nothing was to be saved."""
        seen = update.heartbeats[0].samples_seen if update.heartbeats else self._run.reached
        outcome = {"status": "interrupted", "reason": "asked to stop", "samples_seen": seen}
        return outcome | {"metrics": {}}

    def _check(self, update: DriverUpdate) -> GatdistError | None:
        """Return why the workers must be killed, or None; order them to stop where necessary."""
        now = time.monotonic()
        if update.failure is not None:
            # The others would wait for the one that failed; Ray may not notice.
            return _reported(update) if update.controller is not None else None
        if not self._has_started and len(update.heartbeats) == self._size:
            self._has_started = True
            self._run.start_s = now - self._began
        if update.members and (error := self._check_members(update, now)):
            return error
        if not self._has_started:
            error = self._check_start(update, now)
        elif update.is_between:  # all wait for those of the next epoch, for a limited time
            error = None
        else:
            error = self._check_stragglers(update, now)
        if error is None and now - self._looked > _LOOK_AT_NODES_S:
            self._looked = now
            return self._check_nodes(update, now)
        return error

    def _check_members(self, update: DriverUpdate, now: float) -> GatdistError | None:
        """Take lost workers out of the run; return why it can't continue without them."""
        if not update.is_between:
            self._between_since = None
            if now - self._looked <= _LOOK_AT_NODES_S:
                return None
        of_nodes = set(Nodes.now().lost({one.node for one in update.heartbeats}))
        dead = dead_actors(update.members)
        dead |= {one.actor for one in update.heartbeats if one.node in of_nodes}
        if dead:
            names = [str(one) for one in update.heartbeats if one.actor in dead]
            message = f"{' and '.join(names) or 'a worker'} died"
            if error := self._without(dead, update, message):
                return error
        if update.is_between:
            self._between_since = self._between_since or now
            if now - self._between_since > self._cluster.wait_for_workers_s:
                return WorkerLostError("no replacement for a lost worker")
        return None

    def _without(self, lost: set[str], update: DriverUpdate, why: str) -> GatdistError | None:
        """Let the others continue without lost workers; return the error if they can't."""
        run, error = self._run, WorkerLostError(why)
        if not set(update.members) - lost:
            return error
        run.disturbances += 1
        run.bridge.lose(sorted(lost), why)
        if not run.recovery.decide(error, run.reached).retries:
            return error
        run.show("warning", {"message": f"{why}. The others continue"})
        return None

    def _check_start(self, update: DriverUpdate, now: float) -> GatdistError | None:
        waited_s = now - self._began
        limit_s = self._cluster.startup_timeout_s + self._cluster.wait_for_workers_s
        if waited_s < limit_s or update.controller is None:
            return None
        return WorkerLostError(f"the {self._size} workers did not start within {waited_s:.0f} s")

    def _check_stragglers(self, update: DriverUpdate, now: float) -> GatdistError | None:
        """Report stragglers with the stacks of all workers, and then end the launch."""
        timeout_s, warn_s = self._cluster.heartbeat_timeout_s, self._cluster.straggler_warn_s
        lengthy_s = max(0.0, self._cluster.startup_timeout_s - timeout_s)
        late = policies.straggler_report(update.heartbeats, warn_s, lengthy_s)
        if late is None:
            self._late_since, self._straggler_reported = None, False
            return None
        if self._late_since is None:
            self._late_since = now
            self._stacks_requested += 1
            self._run.bridge.order("stacks", self._stacks_requested)
            return None
        answering = sum(heartbeat.silent_s < warn_s for heartbeat in update.heartbeats)
        if len(update.stacks) < answering and now - self._late_since < _STACKS_WAIT_S:
            return None
        if not self._straggler_reported:
            self._straggler_reported = True
            file = self._write_stacks(update, late)
            self._run.show("warning", {"message": f"{late.message}; stacks: {file}"})
        if late.for_s < timeout_s:
            return None
        message = f"{late.message}, more than cluster.heartbeat_timeout_s"
        return self._without({one.actor for one in late.workers}, update, message)

    def _write_stacks(self, update: DriverUpdate, late: policies.StragglerReport) -> str:
        store = Store(self._run.run_dir, self._run.config.run.storage_options)
        name = f"logs/stacks-{self._run.launches:03d}-{self._stacks_requested:02d}.txt"
        workers = {heartbeat.rank: str(heartbeat) for heartbeat in update.heartbeats}
        stacks = [f"== {workers[rank]}\n{text}" for rank, text in update.stacks.items()]
        store.publish(name, "\n\n".join([late.message, *stacks]).encode())
        return f"{store.url}/{name}"

    def _check_nodes(self, update: DriverUpdate, now: float) -> GatdistError | None:
        """Handle hosts that have died, will be taken away, or have joined."""
        run = self._run
        used = {heartbeat.node: heartbeat.host for heartbeat in update.heartbeats}
        nodes = Nodes.now()
        if not update.members and (lost := nodes.lost(used)):
            hosts = ", ".join(sorted(used[node] for node in lost))
            return WorkerLostError(f"lost {hosts}: Ray can't reach it any more")
        if run.interrupted or self.stop_reason:
            return None
        left_s = nodes.leaving(used)
        if left_s is not None:
            hosts = ", ".join(sorted(used[node] for node in used if node in nodes.draining))
            soon = f"in {left_s:.0f} s" if left_s < float("inf") else "soon"
            run.disturbances += 1
            self._ask_to_stop(f"{hosts} will be taken away {soon}")
            return None
        later = policies.largest(run.sizes, self._size + nodes.room(run.needs))
        left_s = min(run.left_s, policies.undisturbed_s(now - run.began, run.disturbances))
        speedups = run.config.speedup(self._size), later and run.config.speedup(later)
        if self._growth.decide(*speedups, left_s, run.start_s, now):
            self._ask_to_stop(f"room for {later} workers instead of {self._size}")
        return None

    def _ask_to_stop(self, reason: str) -> None:
        self.stop_reason = reason
        self._run.note(f"{reason}: restarting after a checkpoint")
        self._run.bridge.order("stop")


_RESUMES = "The same command resumes from the last checkpoint"


def _final(error: GatdistError, reason: str, log: Path) -> GatdistError:
    """Return an error for the user, when there is no other launch."""
    if not isinstance(error, WorkerLostError):
        return error
    failed = f" ({reason})" if reason else ""
    return WorkerLostError(f"{error}{failed}. {_RESUMES}. Ray's log: {log}")


def _reported(update: DriverUpdate) -> GatdistError:
    """Return a worker's error; if it only lost its connections, the death of the others."""
    assert update.failure is not None
    error = rebuilt(*update.failure)
    if isinstance(error, WorkerLostError):
        dead = dead_actors([heartbeat.actor for heartbeat in update.heartbeats])
        names = [str(heartbeat) for heartbeat in update.heartbeats if heartbeat.actor in dead]
        if names:
            return WorkerLostError(f"{' and '.join(names)} died")
    return error


def _explained(
    error: BaseException | None, heartbeats: Sequence[policies.Heartbeat], log: Path
) -> GatdistError:
    """Return the cause of Ray Train's error."""
    failures = getattr(error, "worker_failures", None) or {}
    names = {heartbeat.rank: str(heartbeat) for heartbeat in heartbeats}
    for rank, cause in sorted(failures.items()):
        if isinstance(cause, ray.exceptions.RayActorError | RayTrainError):
            return WorkerLostError(f"{names.get(rank, f'worker {rank}')} died")
        _log(f"worker {rank} failed:\n{cause}")
        return TrainingError(f"worker {rank} failed: {summary(cause)}. See {log}")
    if error is None:
        return WorkerLostError("the workers ended without an outcome")
    cause = getattr(error, "controller_failure", error)
    _log(f"the workers failed:\n{cause}")
    if names:
        return WorkerLostError(f"Ray Train failed ({summary(cause)})")
    return WorkerLostError(f"the workers did not start ({summary(cause)})")


def _log(text: str) -> None:
    """Write to Ray's log, which standard error is redirected to."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
