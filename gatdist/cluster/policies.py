"""Decisions of the driver, without Ray: number of workers, retries, stragglers."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gatdist.common.errors import ClusterError, ConfigError, GatdistError, RetryableError
from gatdist.config import ClusterConfig, Config

_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 30.0
_HOUR_S = 3600.0


# Heartbeats


HEARTBEAT_S = 0.5
# Without one for so many intervals, a host may be gone.
STALE_INTERVALS = 3
# As much as the driver and its mailbox can do with less than a third of a core.
_MESSAGES_PER_S, _WORKERS_LOOKED_AT_PER_S, _WORKERS_POLLED_PER_S = 400, 5000, 200
LOOK_S, _POLL_S = 0.2, 0.5


def heartbeat_interval_s(num_hosts: int) -> float:
    """Return the seconds between the messages of each host."""
    return max(HEARTBEAT_S, num_hosts / _MESSAGES_PER_S)


def look_interval_s(num_workers: int) -> float:
    """Return the seconds between the driver's looks at all workers."""
    return max(LOOK_S, num_workers / _WORKERS_LOOKED_AT_PER_S)


def poll_interval_s(num_workers: int) -> float:
    """Return the seconds between Ray Train's requests to each worker."""
    return max(_POLL_S, num_workers / _WORKERS_POLLED_PER_S)


# Number of workers


def this_machine() -> dict[str, float]:
    """Return the resources of this machine, as a Ray started here would count them."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def needs_of(
    cluster: ClusterConfig, has: Mapping[str, float], *, grows: bool = False
) -> dict[str, float]:
    """Return the resources of each worker, given those of the cluster.

    Raises ClusterError if ``cluster.gpus_per_worker`` must be set: the cluster has no GPUs, and an
    autoscaler may add some (``grows``).
    """
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = int(has.get("GPU", 0) > 0)
        if grows and not gpus:
            raise ClusterError(
                "cluster.gpus_per_worker",
                "is required: the cluster has no GPU yet, and its autoscaler may add some",
                hint="Use --set cluster.gpus_per_worker=1, or =0 to train on CPUs",
            )
    needs = {"CPU": float(cluster.cpus_per_worker)} | cluster.resources_per_worker
    return needs | ({"GPU": float(gpus)} if gpus else {})


def resolved(config: Config, needs: Mapping[str, float]) -> Config:
    """Return the configuration without ``auto`` in ``cluster``, for workers with these resources.

    Raises ConfigError for spares of a run that a loss restarts.
    """
    cluster = config.cluster
    backend = cluster.backend
    if backend == "auto":
        backend = "nccl" if "GPU" in needs else "gloo"
    after_loss = cluster.after_loss
    if after_loss == "auto":
        after_loss = "restart" if backend == "nccl" else "continue"
    if cluster.spares and after_loss == "restart":
        raise ConfigError(
            "cluster.spares",
            "needs cluster.after_loss = 'continue'",
            value=cluster.spares,
            hint="With NCCL, that is not the default, since it has never been run",
        )
    chosen = cluster.model_copy(update={"backend": backend, "after_loss": after_loss})
    return config.model_copy(update={"cluster": chosen})


def room_for(needs: Mapping[str, float], hosts: Sequence[Mapping[str, float]]) -> int:
    """Return how many workers fit on hosts with these resources."""
    requested = {name: amount for name, amount in needs.items() if amount > 0}
    return sum(
        int(min((has.get(name, 0.0) + 1e-6) // amount for name, amount in requested.items()))
        for has in hosts
    )


def too_small(
    cluster: ClusterConfig, size: int, needs: Mapping[str, float], has: Mapping[str, float]
) -> ClusterError:
    """Return the error of a cluster without room for ``size`` workers."""
    where = "the cluster" if cluster.address else "this machine"
    # The scarcest resource. If there is enough of each, they are in use or spread too thinly.
    name = min(needs, key=lambda name: has.get(name, 0) / needs[name])
    room = int(has.get(name, 0) // needs[name])
    total = f"need {size * needs[name]:g} {name}s, and {where} has {has.get(name, 0):g}"
    return ClusterError(
        "--workers",
        total if room < size else f"{total}, but too few on hosts where a worker fits",
        value=cluster.workers,
        hint=f"Use --workers {room}" if 0 < room < size else f"Add a host with a {name}",
    )


def largest(sizes: Sequence[int], room: int) -> int | None:
    """Return the largest of ``sizes``, which ascend, that fits; None if none does."""
    count = bisect_right(sizes, room)
    return sizes[count - 1] if count else None


def size_to_launch(
    sizes: Sequence[int], room: int, capacity: int, waited_s: float, patience_s: float
) -> int | None:
    """Return how many workers to launch now; None to wait.

    Ray takes a moment to release the resources of the last launch. For ``patience_s`` seconds,
    wait for as many workers as fit on idle hosts (``capacity``); then accept what fits now
    (``room``).
    """
    now = largest(sizes, room)
    return now if now == largest(sizes, capacity) or waited_s >= patience_s else None


def num_to_start(sizes: Sequence[int], present: int, room: int, spares: int) -> int:
    """Return how many more workers to start beside those present, where ``room`` more fit.

    They are for the largest of ``sizes`` that is possible, and spares.
    """
    most = largest(sizes, present + room) or 0
    return max(0, min(room, most + spares - present))


def is_worth_resizing(now: float, later: float, left_s: float, cost_s: float) -> bool:
    """Whether going from speedup ``now`` to ``later`` saves at least twice the cost of a restart.

    Speedups are those of :meth:`gatdist.config.Config.speedup`; ``left_s`` are the seconds that the
    run would take at its current size.
    """
    return later > now and left_s * (1 - now / later) > 2 * cost_s


def undisturbed_s(elapsed_s: float, disturbances: int) -> float:
    """Return the expected seconds until the next failure or preemption notice.

    That restart adds new hosts anyway. The estimate is the observed rate, with a prior of one
    disturbance per hour.
    """
    return (elapsed_s + _HOUR_S) / (disturbances + 1)


@dataclass
class Growth:
    """Decides when to add workers: once the room has lasted for ``patience_s`` seconds.

    That doubles with each of the ``failures`` to add some.
    """

    patience_s: float
    since_s: float | None = None
    failures: int = 0

    def decide(
        self, now: float, later: float | None, left_s: float, cost_s: float, at_s: float
    ) -> bool:
        """Whether to resize at the time ``at_s``; see :func:`is_worth_resizing`."""
        if later is None or not is_worth_resizing(now, later, left_s, cost_s):
            self.since_s = None
            return False
        if self.since_s is None:
            self.since_s = at_s
        return at_s - self.since_s >= min(self.patience_s * 2**self.failures, _HOUR_S)


# Retries


@dataclass(frozen=True)
class RetryDecision:
    """Whether to launch the workers again after a failure."""

    retries: bool
    delay_s: float = 0.0
    reason: str = ""  # why not, unless the failure itself says so


class Recovery:
    """Retries with backoff, until more than ``max_failures`` in a row without progress."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0
        self._reached = -1

    def decide(self, error: GatdistError, reached: int) -> RetryDecision:
        """Decide after ``error``.

        ``reached`` are the samples seen by the newest checkpoint, or by the workers that continue.
        """
        if not isinstance(error, RetryableError):
            return RetryDecision(False)
        if reached > self._reached:
            self._failures, self._reached = 0, reached
        self._failures += 1
        if self._failures > self._max_failures:
            reason = f"{self._failures} times in a row without progress between them"
            return RetryDecision(False, reason=reason if self._max_failures else "")
        if self._failures == 1:  # at once: most often a host was taken away
            return RetryDecision(True)
        return RetryDecision(True, min(_FIRST_DELAY_S * 2 ** (self._failures - 2), _MAX_DELAY_S))


# Stragglers. A worker that is stopped or cut off sends no heartbeats. One that is deadlocked sends
# them, but enters no phase any more; nor do the others, who wait for it. It is the one that has not
# reached a collective that others have; else the one that has entered the fewest phases, or is in
# the same phase as the others without waiting for them. On GPUs only the first says who it is: the
# host runs ahead of the device, and waits for it in any call.


class Heartbeat(NamedTuple):
    """The last heartbeat of a worker."""

    rank: int
    host: str
    node: str  # Ray's id of the host
    actor: str  # Ray's id of the worker
    pid: int
    phase: str
    step: int  # since the run began
    num_phases: int  # entered since the workers last changed
    silent_s: float  # since the heartbeat
    still_s: float  # since the training thread last made progress
    waits: bool | None = None  # whether it waits for other workers; None if unknown
    lengthy: bool = False  # starts, compiles or does something else that takes minutes
    samples_seen: int = 0
    is_saved: bool = False  # on worker 0: the newest checkpoint holds all steps
    # Numbers of its last collectives: launched, started (None if unknown), completed.
    flight: tuple[int, int | None, int] | None = None

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Heartbeat:
        """Return the heartbeat in JSON values, of which unknown ones are ignored."""
        return cls(**{name: fields[name] for name in cls._fields if name in fields})

    def __str__(self) -> str:
        return f"worker {self.rank} on {self.host} (process {self.pid})"


class StragglerReport(NamedTuple):
    """The workers that the others wait for, for how many seconds, and a message."""

    workers: tuple[Heartbeat, ...]
    for_s: float
    message: str


def straggler_report(
    heartbeats: Sequence[Heartbeat], straggler_warn_s: float, lengthy_s: float = 0.0
) -> StragglerReport | None:
    """Return which workers have been late for more than ``straggler_warn_s``, or None.

    As long as one worker makes progress, the others may wait for it. A ``lengthy`` operation may
    take ``lengthy_s`` longer.
    """
    if not heartbeats:
        return None
    silent = [heartbeat for heartbeat in heartbeats if heartbeat.silent_s > straggler_warn_s]
    if silent:
        for_s = max(heartbeat.silent_s for heartbeat in silent)
        return _report(silent, for_s, "sent no heartbeat")
    for_s = min(heartbeat.still_s - lengthy_s * heartbeat.lengthy for heartbeat in heartbeats)
    if for_s <= straggler_warn_s:
        return None
    missing = _missing(heartbeats)
    if missing:
        return _report(missing, for_s, "kept the others waiting in a collective")
    fewest = min(heartbeat.num_phases for heartbeat in heartbeats)
    behind = [heartbeat for heartbeat in heartbeats if heartbeat.num_phases == fewest]
    working = [heartbeat for heartbeat in behind if heartbeat.waits is False]
    return _report(working or behind, for_s, "made no progress")


def lengthy_s(cluster: ClusterConfig) -> float:
    """Return by how much a lengthy operation may exceed the limit of others."""
    return max(0.0, cluster.startup_timeout_s - cluster.heartbeat_timeout_s)


def overdue(
    cluster: ClusterConfig, late: Sequence[str], heartbeats: Sequence[Heartbeat], waited_s: float
) -> StragglerReport | None:
    """Return those of the ``late`` workers, by Ray's ids, that have hung while others wait.

    They do so since ``waited_s``: before, a late one may have waited for one that is now lost.
    """
    limit_s, slack_s = cluster.heartbeat_timeout_s, lengthy_s(cluster)
    hung = {
        one: min(waited_s, max(one.silent_s, one.still_s - slack_s * one.lengthy))
        for one in heartbeats
        if one.actor in late
    }
    hung = {one: for_s for one, for_s in hung.items() if for_s > limit_s}
    if not hung:
        return None
    return _report([*hung], max(hung.values()), "did not follow the others")


def _missing(heartbeats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Return the workers that have not reached the first collective that is not complete.

    Empty if this is unknown, or holds for all of them.
    """
    flights = [heartbeat.flight for heartbeat in heartbeats if heartbeat.flight is not None]
    if len(flights) < len(heartbeats):
        return []
    pairs = list(zip(heartbeats, flights, strict=True))
    stuck = 1 + min(completed for _, _, completed in flights)
    absent = [one for one, (launched, _, _) in pairs if launched < stuck]
    if not absent:  # all hosts have launched it, but not all devices may have reached it
        absent = [one for one, (_, started, _) in pairs if started is not None and started < stuck]
    return absent if len(absent) < len(heartbeats) else []


def _report(late: Sequence[Heartbeat], for_s: float, what: str) -> StragglerReport:
    where = f"phase {late[0].phase!r} of step {late[0].step:,}"
    message = f"{' and '.join(map(str, late))} {what} for {for_s:.0f} s; last seen in {where}"
    return StragglerReport(tuple(late), for_s, message)
