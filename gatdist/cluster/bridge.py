"""Messages between the driver and its workers, through an actor on the driver's node."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gatdist.cluster.policies import HEARTBEAT_S, Heartbeat, heartbeat_interval_s
from gatdist.cluster.preflight import HostInfo
from gatdist.cluster.roster import Address, Roster, Seat
from gatdist.common.errors import WorkerLostError
from gatdist.config import set_env

Event = tuple[str, dict[str, Any]]
Orders = dict[str, Any]
_NO_ORDERS: Orders = {"stop": False, "stacks": 0}
# Ray restarts a mailbox within seconds.
_ANSWER_S = 60.0


class DriverUpdate(NamedTuple):
    """What the driver reads from the mailbox."""

    events: list[Event]  # for the console, since the last update
    heartbeats: list[Heartbeat]  # the last one of each worker, by rank
    stacks: dict[int, str]  # requested ones, by rank
    outcome: dict[str, Any] | None  # what the training loop returned
    failure: tuple[str, str] | None  # class and message of a worker's first GatdistError
    controllers: dict[int, Any]  # handles of Ray Train's, by the number of its run, once it starts
    waiting: dict[str, str]  # nodes of the workers that are ready to join, by worker
    members: list[str]  # of the present epoch, without those lost; empty if there are no epochs
    late: list[str]  # of them who have not arrived for the next epoch, once theirs has ended
    is_between: bool  # whether that epoch has ended, and the next one has not begun
    epoch: int  # its number; 0 if there are no epochs
    interval_s: float  # between heartbeats


class Mailbox:
    """An actor that holds the messages of one launch; those of an earlier launch are ignored.

    If it dies, Ray restarts it empty. It fills up again, since workers keep sending heartbeats and
    the driver its orders.
    """

    def __init__(self) -> None:
        self._given: dict[str, Any] | None = None
        self._begin(0)

    def _begin(self, launch: int) -> None:
        self._launch = launch
        self._events: list[Event] = []
        self._heartbeats: dict[str, dict[str, Any]] = {}  # by worker
        self._interval_s = HEARTBEAT_S
        self._actors: dict[str, Any] = {}  # handles, by worker
        self._roster: Roster | None = None
        self._stacks: dict[int, dict[str, Any]] = {}
        self._orders = _NO_ORDERS
        self._outcome: dict[str, Any] | None = None
        self._failure: tuple[str, str] | None = None
        self._controllers: dict[int, Any] = {}
        self._hosts: dict[str, HostInfo] = {}  # that fit together, by address

    def report(self, launch: int, what: str, *given: Any) -> Any:
        """Call the handler ``_what`` with a message of a worker or controller."""
        if launch > self._launch:
            self._begin(launch)
        return getattr(self, f"_{what}")(*given) if launch == self._launch else None

    def take(self, launch: int, orders: Orders) -> DriverUpdate:
        """Store the driver's orders and return an update.

        The orders are to ``stop``, and the number of the last request for ``stacks``.
        """
        if launch > self._launch:
            self._begin(launch)
        if orders["stacks"] != self._orders["stacks"]:
            self._stacks = {}
        self._orders = orders
        events, self._events = self._events, []
        now = time.monotonic()
        self._interval_s = heartbeat_interval_s(len({b["node"] for b in self._heartbeats.values()}))
        if self._roster:
            if orders["stop"]:
                self._roster.accept_any_size()
            self._roster.look()
        members = self._roster.present if self._roster else []
        present = [*self._heartbeats.values()]
        if self._roster and members:  # by their new ranks, which their last heartbeats may lack
            present = [
                self._heartbeats[worker] | {"rank": rank}
                for rank, worker in enumerate(self._roster.members)
                if worker in members and worker in self._heartbeats
            ]
        heartbeats = [
            Heartbeat.parse(
                fields
                | {
                    "silent_s": now - fields["heard"],
                    "still_s": fields["still_s"] + now - fields["heard"],
                    "waits": self._stacks.get(fields["rank"], {}).get("waits"),
                    "flight": self._stacks.get(fields["rank"], {}).get("flight"),
                }
            )
            for fields in sorted(present, key=itemgetter("rank"))
        ]
        stacks = {rank: message["text"] for rank, message in sorted(self._stacks.items())}
        return DriverUpdate(
            events,
            heartbeats,
            stacks,
            self._outcome,
            self._failure,
            self._controllers,
            self._waiting(),
            members,
            self._roster.late if self._roster else [],
            self._roster is not None and self._roster.has_ended,
            self._roster.epoch if self._roster else 0,
            self._interval_s,
        )

    def _waiting(self) -> dict[str, str]:
        joining = self._roster.joining if self._roster else []
        return {worker: self._heartbeats.get(worker, {}).get("node", "") for worker in joining}

    def lose(self, launch: int, workers: list[str], cause: str) -> None:
        """Take note that workers have died, or must not continue, and end their processes.

        ``cause`` says why.
        """
        if self._roster and launch == self._launch:
            for worker in workers:
                if actor := self._actors.pop(worker, None):
                    ray.kill(actor)
                self._heartbeats.pop(worker, None)
                self._roster.lose(worker, cause)

    def leave(self, launch: int, workers: list[str], cause: str) -> None:
        """Let workers leave at the end of a step, as soon as the others suffice."""
        if self._roster and launch == self._launch:
            for worker in workers:
                self._roster.leave(worker, cause)

    def give(self, given: dict[str, Any]) -> None:
        """Store what workers need to start, with secrets: Ray does not log arguments of methods."""
        self._given = given

    def given(self) -> dict[str, Any] | None:
        """Return what was stored; None after a restart."""
        return self._given

    # Handlers of `report`, by the names that workers send.

    def _event(self, kind: str, fields: dict[str, Any]) -> None:
        self._events.append((kind, fields))

    def _heartbeats_of_host(self, beats: Sequence[dict[str, Any]]) -> Orders:
        """Take note of heartbeats, which are ``age_s`` old. Return the orders to their workers.

        Those ``lost`` must stop, since the others continue without them.
        """
        roster, now, lost = self._roster, time.monotonic(), []
        for beat in beats:
            worker, heard = beat["actor"], now - beat["age_s"]
            if roster and not roster.is_member(worker):
                lost.append(worker)
            elif heard > self._heartbeats.get(worker, {}).get("heard", 0.0):
                self._heartbeats[worker] = beat | {"heard": heard}
        orders = self._orders | {"interval_s": self._interval_s, "lost": lost}
        if not roster:
            return orders
        return orders | {
            "epoch": roster.epoch,
            "is_between": roster.has_ended,
            "is_due": roster.is_due,
        }

    def _actor(self, worker: str, actor: list[Any]) -> None:
        (self._actors[worker],) = actor

    def _enroll(self, sizes: Sequence[int], workers: list[str]) -> None:
        self._roster = Roster(sizes, workers)

    def _arrive(self, worker: str, meets_at: Address, host: str) -> None:
        if self._roster:
            self._roster.arrive(worker, meets_at, host)

    def _seat(self, worker: str) -> tuple[Seat | None, bool, bool, bool]:
        is_over, stops = self._outcome is not None, bool(self._orders["stop"])
        if not self._roster:  # a mailbox that was restarted
            return None, False, is_over, stops
        self._roster.look()
        return self._roster.seat(worker), self._roster.is_member(worker), is_over, stops

    def _withdraw(self, worker: str) -> None:
        """Continue without a worker that can't join; its process goes on."""
        self._heartbeats.pop(worker, None)
        if self._roster:
            self._roster.lose(worker)

    def _stack(self, worker: str, rank: int, fields: dict[str, Any]) -> None:
        if not self._roster or worker in self._roster.members:  # others have no rank yet
            self._stacks[rank] = fields

    def _finish(self, outcome: dict[str, Any]) -> None:
        self._outcome = outcome
        if self._roster:
            self._roster.end()

    def _fail(self, kind: str, message: str, worker: str = "") -> None:
        if self._roster and worker in self._roster.lost:
            return  # the others continue without it: a worker that was cut off, or has hung
        self._failure = self._failure or (kind, message)  # the first one causes the others

    def _control(self, number: int, controller: list[Any]) -> bool:
        (self._controllers[number],) = controller
        return True  # else its launch is over

    def _examined(self, hosts: list[HostInfo]) -> tuple[list[HostInfo], float]:
        """Take note of hosts that fit together. Return all of them, and the time."""
        self._hosts |= {host.address: host for host in hosts}
        return [*self._hosts.values()], time.time()

    def _has_members(self) -> bool:
        """Whether there are workers that others can join."""
        return bool(self._roster and self._roster.present)

    def _is_over(self) -> bool:
        return self._outcome is not None


class Bridge:
    """A handle to a :class:`Mailbox` for one launch, which can be sent to workers.

    Without an ``actor``, it starts a mailbox on the driver's node. Its ``name`` is that of no other
    launch.
    """

    def __init__(self, actor: Any = None, launch: int = 0) -> None:
        self.launch, self.name = launch, uuid.uuid4().hex
        self._orders = _NO_ORDERS
        self.controllers: dict[int, Any] = {}
        self.actor: Any = (
            actor
            or ray.remote(num_cpus=0)(cast(Any, Mailbox))
            .options(
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
            )
            .remote()
        )

    def begin(self, launch: int) -> Bridge:
        """Return the bridge of a new launch, and clear the mailbox."""
        bridge = Bridge(self.actor, launch)
        bridge.take()
        return bridge

    def emit(self, kind: str, fields: dict[str, Any]) -> None:
        """Send an event for the console, without waiting for its arrival."""
        self.actor.report.remote(self.launch, "event", kind, fields)

    def report(self, what: str, *given: Any, timeout_s: float | None = None) -> Any:
        """Send a message to a handler of the mailbox, and return its answer."""
        return ray.get(self.actor.report.remote(self.launch, what, *given), timeout=timeout_s)

    def order(self, name: Literal["stop", "stacks"], value: Any = True) -> None:
        """Set an order to all workers, which the next :meth:`take` sends."""
        self._orders = {**self._orders, name: value}

    def take(self) -> DriverUpdate:
        """See :meth:`Mailbox.take`.

        Raises:
            WorkerLostError: the mailbox died and does not come back.
        """
        try:
            update: DriverUpdate = ray.get(
                self.actor.take.remote(self.launch, self._orders), timeout=_ANSWER_S
            )
        except ray.exceptions.RayError as error:
            raise WorkerLostError(f"the driver's mailbox died ({type(error).__name__})") from error
        # Each is reported once, and not to a mailbox that was restarted.
        self.controllers |= update.controllers
        return update._replace(controllers=self.controllers)

    def lose(self, workers: Sequence[str], cause: str) -> None:
        """See :meth:`Mailbox.lose`."""
        ray.get(self.actor.lose.remote(self.launch, list(workers), cause), timeout=_ANSWER_S)

    def leave(self, workers: Sequence[str], cause: str) -> None:
        """See :meth:`Mailbox.leave`."""
        ray.get(self.actor.leave.remote(self.launch, list(workers), cause), timeout=_ANSWER_S)

    def give(self, given: dict[str, Any]) -> None:
        """Store what workers need to start. It is neither logged nor written."""
        ray.get(self.actor.give.remote(given))

    def given(self) -> dict[str, Any]:
        """Return what the driver has stored, and set its environment variables here.

        Raises:
            WorkerLostError: the mailbox was restarted meanwhile.
        """
        given: dict[str, Any] | None = ray.get(self.actor.given.remote())
        if given is None:
            raise WorkerLostError("the driver's mailbox was restarted while workers started")
        set_env(given["environment"])
        return given
