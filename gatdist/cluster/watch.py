"""One launch of the workers: the driver starts them, watches them, and lets them change or end."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray
from ray.train.v2._internal.exceptions import RayTrainError

from gatdist.cluster import policies, runtime_env
from gatdist.cluster.bridge import Bridge, DriverUpdate
from gatdist.cluster.driver import Driver
from gatdist.cluster.nodes import Nodes, dead_actors, silent_hosts
from gatdist.cluster.preflight import marker
from gatdist.cluster.ray_train import RayTrain
from gatdist.common.errors import (
    GatdistError,
    TrainingError,
    WorkerLostError,
    rebuilt,
    summary,
)
from gatdist.storage import Store

_LOOK_AT_NODES_S = 1.0
# How long room must last before more workers are started: at the cost of a restart, or without.
_GROWTH_PATIENCE_S, _JOIN_PATIENCE_S = 10.0, 3.0
# For how long workers that join hold up the others, generously.
_JOIN_S = 2.0
# Heartbeats of workers that have continued arrive meanwhile: until then they seem to wait.
_SETTLE_INTERVALS = 4
# At most so many workers are looked up at a time.
_MOST_SUSPECTS = 256
# The stacks of workers that answer arrive within so many intervals between heartbeats.
_STACKS_INTERVALS = 6
# Ray Train ends within this, once the workers have.
_END_S = 3.0


class Launch:
    """One launch of ``size`` workers. If it continues without lost workers, more may join it.

    Attributes:
        stop_reason: why the driver has asked the workers to stop; "" if it has not.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver, self._size, self._cluster = driver, size, driver.config.cluster
        self.stop_reason = ""
        self._trains: list[RayTrain] = []
        self._records = ""
        self._began = self._looked = time.monotonic()
        self._has_started = False  # all workers have sent heartbeats
        self._growth = policies.Growth(_JOIN_PATIENCE_S if driver.continues else _GROWTH_PATIENCE_S)
        self._stragglers = _Stragglers(driver)
        self._leaving: set[str] = set()
        self._waiting = 0
        self._between = (-1, 0.0)  # the epoch that has ended, and when that was seen
        self._lossy_epoch = -1  # the last one that has lost a worker
        self._settles_until = 0.0
        self._over_since: float | None = None
        self._saved_since: float | None = None

    def train(self, reason: str) -> dict[str, Any]:
        """Start the workers, watch them to their end, and return the training loop's outcome.

        Args:
            reason: why there is this launch, for ``attempts.jsonl``.

        Raises:
            GatdistError: the launch has failed.
        """
        driver = self._driver
        driver.bridge = driver.bridge.begin(driver.launches)
        driver.metrics.launch()
        driver.left_s = 0.0
        folder = tempfile.TemporaryDirectory(prefix="gatdist-ray-", ignore_cleanup_errors=True)
        with folder as self._records, ExitStack() as start:
            options = driver.config.run.storage_options
            left = start.enter_context(marker(driver.run_dir, options))
            driver.bridge.give(runtime_env.at_start(driver.config, driver.run_dir, left))
            self._start(self._size, reason)
            while any(train.is_alive() for train in self._trains):
                time.sleep(policies.look_interval_s(self._size))
                update = self._take()
                if self._has_started and not driver.continues:
                    start.close()  # deletes the marker; workers that join look for it
                error = self._check(update)
                if not error and not self._can_end(update) and not self._hangs(update):
                    continue
                # Users who have asked for the end do not wait for Ray Train's.
                self._abort(update.controllers, waits=error is not None or not driver.interrupted)
                if update.outcome is None:
                    if error:
                        raise error
                    return self._interrupted(update)
            update = driver.bridge.take()
        driver.show_all(update.events)
        # A host with a preemption notice leaves as soon as it is idle, which is no failure now.
        if update.outcome is not None:
            return update.outcome
        if update.failure is not None:
            raise _reported(update)
        RayTrain.release()  # a controller that died has released nothing
        raise _explained(self._trains[0].error, update.heartbeats, driver.log)

    def _start(self, num_workers: int, reason: str) -> None:
        """Start workers. All but the first ones join these."""
        driver = self._driver
        train = RayTrain(
            driver.config,
            number=len(self._trains),
            num_workers=num_workers,
            sizes=driver.sizes if driver.continues else (),
            needs=driver.needs,
            bridge=driver.bridge,
            records=self._records,
            reason=reason,
            first=driver.launches == 1,
        )
        self._trains.append(train)
        train.start()

    def _abort(self, controllers: dict[int, Any], *, waits: bool = True) -> None:
        """End all workers at once, also those that do not answer.

        What has not started, and what is left if this does not wait, ends with the driver.
        """
        for number, controller in controllers.items():
            self._trains[number].abort(controller, waits=waits)
        if controllers and waits:
            RayTrain.release()

    def _take(self) -> DriverUpdate:
        """Send orders to the workers, and show what they report."""
        driver = self._driver
        if driver.interrupted:  # a signal handler must not call Ray
            driver.bridge.order("stop")
        try:
            update = driver.bridge.take()
        except WorkerLostError:
            self._abort(driver.bridge.controllers)
            driver.bridge = Bridge()
            raise
        driver.metrics.look(update.heartbeats)
        driver.show_all(update.events)
        waiting = len(update.waiting)
        if waiting > self._waiting and self._cluster.spares:
            driver.note(f"{waiting} spare worker{'s' * (waiting > 1)} ready")
        self._waiting = waiting
        return update

    def _can_end(self, update: DriverUpdate) -> bool:
        """Whether workers that were asked to stop may be killed, since nothing is to be saved.

        So it is while they start, and while they evaluate after a checkpoint. Others stop by
        themselves.
        """
        starts = not update.heartbeats
        saved = starts or update.outcome is not None or update.heartbeats[0].is_saved
        if not (self._driver.interrupted or self.stop_reason) or not saved:
            self._saved_since = None
            return False
        now = time.monotonic()
        self._saved_since = self._saved_since or now
        # Others stop meanwhile: they have got the order.
        return now - self._saved_since > policies.STALE_INTERVALS * update.interval_s

    def _hangs(self, update: DriverUpdate) -> bool:
        """Whether Ray Train is still busy, such as with a replacement, though the run is over."""
        now = time.monotonic()
        if update.outcome is None or len(_silent(update)) < len(update.heartbeats):
            self._over_since = None
            return False
        self._over_since = self._over_since or now
        return now - self._over_since > _END_S

    def _interrupted(self, update: DriverUpdate) -> dict[str, Any]:
        """Return the outcome of workers that were killed when nothing was to be saved."""
        seen = update.heartbeats[0].samples_seen if update.heartbeats else self._driver.reached
        outcome = {"status": "interrupted", "reason": "asked to stop", "samples_seen": seen}
        return outcome | {"metrics": {}}

    def _check(self, update: DriverUpdate) -> GatdistError | None:
        """Return why the workers must be killed, or None; order them to stop where necessary."""
        now = time.monotonic()
        if update.failure is not None:
            # The others would wait for the one that failed; Ray may not notice.
            return _reported(update) if update.controllers else None
        if update.outcome is not None:
            return None
        # Without those that were lost before their first heartbeat.
        if not self._has_started and len(update.heartbeats) == (len(update.members) or self._size):
            self._has_started = True
            self._driver.start_s = now - self._began
        if update.members and (error := self._check_members(update, now)):
            return error
        error = None
        if not self._has_started:
            error = self._check_start(update, now)
        elif update.is_between:  # all wait for those of the next epoch, for a limited time
            self._settles_until = now + _SETTLE_INTERVALS * update.interval_s
        elif now > self._settles_until:
            error = self._check_stragglers(update, now)
        if error is None and now - self._looked > _LOOK_AT_NODES_S:
            self._looked = now
            return self._check_nodes(update)
        return error

    def _check_start(self, update: DriverUpdate, now: float) -> GatdistError | None:
        waited_s = now - self._began
        limit_s = self._cluster.startup_timeout_s + self._cluster.wait_for_workers_s
        if waited_s < limit_s or not update.controllers:
            return None
        return WorkerLostError(f"the {self._size} workers did not start within {waited_s:.0f} s")

    def _check_stragglers(self, update: DriverUpdate, now: float) -> GatdistError | None:
        late = self._stragglers.look(update, now)
        return self._give_up(late, update) if late else None

    def _give_up(self, late: policies.StragglerReport, update: DriverUpdate) -> GatdistError | None:
        message = f"{late.message}, more than cluster.heartbeat_timeout_s"
        return self._without({one.actor for one in late.workers}, update, message)

    def _check_members(self, update: DriverUpdate, now: float) -> GatdistError | None:
        """Take lost workers out of the run; return why it can't continue without them."""
        quiet = _silent(update)
        used = {one.node for one in update.heartbeats}
        silent = used - {one.node for one in update.heartbeats if one.actor not in quiet}
        if silent == used:
            silent = set()  # the driver's own network may be down
        if not update.is_between and not silent and now - self._looked <= _LOOK_AT_NODES_S:
            return None
        nodes = Nodes.now()
        gone = {*nodes.lost(used)}
        gone |= silent_hosts({node: nodes.addresses[node] for node in silent - gone})
        if spares := dead_actors(update.waiting):
            self._driver.bridge.lose(sorted(spares), "")
        dead = dead_actors(suspects(update))
        dead |= {one.actor for one in update.heartbeats if one.node in gone}
        if dead:
            names = [str(one) for one in update.heartbeats if one.actor in dead]
            message = f"{' and '.join(names) or 'a worker'} died"
            if error := self._without(dead, update, message):
                return error
        if update.is_between:
            if self._between[0] != update.epoch:
                self._between = update.epoch, now
            waited_s = now - self._between[1]
            if late := policies.overdue(self._cluster, update.late, update.heartbeats, waited_s):
                return self._give_up(late, update)
            if waited_s > self._cluster.wait_for_workers_s and not self.stop_reason:
                self._ask_to_stop(f"no replacement for a lost worker within {waited_s:.0f} s")
        return None

    def _without(self, lost: set[str], update: DriverUpdate, why: str) -> GatdistError | None:
        """Let the others continue without lost workers; return the error if they can't."""
        driver, error = self._driver, WorkerLostError(why)
        if not set(update.members) - lost:
            return error
        driver.disturbances += 1
        driver.bridge.lose(sorted(lost), why)
        self._settles_until = time.monotonic() + _SETTLE_INTERVALS * update.interval_s
        if update.epoch == self._lossy_epoch:  # more of one loss, such as that of a rack
            driver.warn(f"{why}. The others continue")
            return None
        self._lossy_epoch = update.epoch
        reached = max((one.samples_seen for one in update.heartbeats), default=driver.reached)
        if not driver.recovery.decide(error, reached).retries:
            return error
        driver.warn(f"{why}. The others continue")
        return None

    def _check_nodes(self, update: DriverUpdate) -> GatdistError | None:
        """Handle hosts that have died, will be taken away, or have joined."""
        driver, nodes = self._driver, Nodes.now()
        used = {heartbeat.node: heartbeat.host for heartbeat in update.heartbeats}
        if not update.members and (lost := nodes.lost(used)):
            hosts = ", ".join(sorted(used[node] for node in lost))
            return WorkerLostError(f"lost {hosts}: Ray can't reach it any more")
        if driver.interrupted or self.stop_reason:
            return None
        leaving = {one.actor for one in update.heartbeats if one.node in nodes.draining}
        if spares := {one for one, node in update.waiting.items() if node in nodes.draining}:
            driver.bridge.leave(sorted(spares), "")
        if leaving - self._leaving:
            self._leave(leaving, update, nodes)
        elif self._has_started:
            self._grow(nodes, leaving, len(update.heartbeats))
        return None

    def _leave(self, leaving: set[str], update: DriverUpdate, nodes: Nodes) -> None:
        """Let workers leave before their hosts are taken away."""
        used = {heartbeat.node: heartbeat.host for heartbeat in update.heartbeats}
        left_s = nodes.leaving(used)
        assert left_s is not None
        hosts = ", ".join(sorted(used[node] for node in used if node in nodes.draining))
        soon = f"in {left_s:.0f} s" if left_s < float("inf") else "soon"
        why = f"{hosts} will be taken away {soon}"
        self._driver.disturbances += 1
        if not self._driver.continues or not set(update.members) - leaving:
            self._ask_to_stop(why)
            return
        self._leaving |= leaving
        self._driver.bridge.leave(sorted(leaving), why)
        self._driver.note(f"{why}: workers leave as soon as the others suffice")

    def _grow(self, nodes: Nodes, leaving: set[str], num_working: int) -> None:
        """Start more workers, or all of them anew, where there is room and that is worth it."""
        driver, needs = self._driver, self._driver.needs
        active = [train for train in self._trains if train.is_alive()]
        present = sum(train.num_workers for train in active) - len(leaving)
        # Those that were just started have not yet taken their room.
        room = max(0, min(nodes.room(needs), nodes.capacity(needs) - present))
        more = policies.num_to_start(driver.sizes, present, room, self._cluster.spares)
        now, later = num_working, policies.largest(driver.sizes, present + more)
        speedup, left_s = driver.config.speedup, driver.left_s
        if not driver.continues:
            ran_s = time.monotonic() - driver.began_s
            left_s = min(left_s, policies.undisturbed_s(ran_s, driver.disturbances))
        if later == policies.largest(driver.sizes, present):  # spares, if any
            gains, left_s = (1.0, 2.0 if more else 1.0), float("inf")
        else:
            gains = speedup(now), speedup(later or now)
        cost_s = _JOIN_S if driver.continues else driver.start_s
        # Those that could not start are not replaced at once.
        self._growth.failures = len(self._trains) - len(active)
        if not self._growth.decide(*gains, left_s, cost_s, time.monotonic()):
            return
        if driver.continues:
            driver.note(f"starting {more} more worker{'s' * (more > 1)}")
            self._start(more, "")
            self._growth.since_s = None
        else:
            self._ask_to_stop(f"room for {later} workers instead of {self._size}")

    def _ask_to_stop(self, reason: str) -> None:
        self.stop_reason = reason
        self._driver.note(f"{reason}: restarting after a checkpoint")
        self._driver.bridge.order("stop")


def _silent(update: DriverUpdate) -> set[str]:
    """Return the workers without a heartbeat for so long that their host may be gone."""
    limit_s = policies.STALE_INTERVALS * update.interval_s
    return {one.actor for one in update.heartbeats if one.silent_s > limit_s}


def suspects(update: DriverUpdate) -> list[str]:
    """Return members that may have died: silent ones, and those that do not follow the others."""
    silent_s = {one.actor: one.silent_s for one in update.heartbeats}
    possible = _silent(update) | {*update.late} | ({*update.members} - silent_s.keys())
    found, late = possible & {*update.members}, {*update.late}

    def rank(one: str) -> tuple[bool, float]:
        return one not in late, -silent_s.get(one, float("inf"))

    return sorted(found, key=rank)[:_MOST_SUSPECTS]


class _Stragglers:
    """Reports workers that the others wait for, with the stacks of all workers."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._cluster = driver, driver.config.cluster
        self._since: float | None = None
        self._is_reported = False
        self._requested = 0

    def look(self, update: DriverUpdate, now: float) -> policies.StragglerReport | None:
        """Return those that are to be given up: they are late by ``heartbeat_timeout_s``."""
        timeout_s = self._cluster.heartbeat_timeout_s
        stale_s = policies.STALE_INTERVALS * update.interval_s
        warn_s = max(self._cluster.straggler_warn_s, stale_s)
        slack_s = policies.lengthy_s(self._cluster)
        late = policies.straggler_report(update.heartbeats, warn_s, slack_s)
        if late is None:
            self._since, self._is_reported = None, False
            return None
        if self._since is None:
            self._since = now
            self._requested += 1
            self._driver.bridge.order("stacks", self._requested)
            return None
        answering = sum(heartbeat.silent_s < warn_s for heartbeat in update.heartbeats)
        wait_s = _STACKS_INTERVALS * update.interval_s
        if len(update.stacks) < answering and now - self._since < wait_s:
            return None
        if not self._is_reported:
            self._is_reported = True
            self._driver.warn(f"{late.message}; stacks: {self._write_stacks(update, late)}")
        return None if late.for_s < timeout_s else late

    def _write_stacks(self, update: DriverUpdate, late: policies.StragglerReport) -> str:
        store = Store(self._driver.run_dir, self._driver.config.run.storage_options)
        name = f"logs/stacks-{self._driver.launches:03d}-{self._requested:02d}.txt"
        workers = {heartbeat.rank: str(heartbeat) for heartbeat in update.heartbeats}
        stacks = [f"== {workers[rank]}\n{text}" for rank, text in update.stacks.items()]
        store.publish(name, "\n\n".join([late.message, *stacks]).encode())
        return f"{store.url}/{name}"


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
