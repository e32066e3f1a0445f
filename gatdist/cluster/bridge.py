"""What driver and workers tell each other, through an actor beside the driver."""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gatdist.cluster.watch import Heartbeat
from gatdist.common.errors import WorkerLostError
from gatdist.config import set_env

Event = tuple[str, dict[str, Any]]
Orders = dict[str, Any]
# Ray starts a mailbox again within seconds.
_ANSWER_S = 60.0


class DriverUpdate(NamedTuple):
    """What has come in.

    Attributes:
        events: for people, since the last look.
        heartbeats: the last of each worker.
        stacks: of each worker that has told them, by rank.
        outcome: what the training loop returned; None if it has not.
        failure: class and message of the first error of gatdist's own.
        controller: a handle to Ray Train's controller; None as long as it has not started.
    """

    events: list[Event]
    heartbeats: list[Heartbeat]
    stacks: dict[int, str]
    outcome: dict[str, Any] | None
    failure: tuple[str, str] | None
    controller: Any


class Mailbox:
    """The state between driver and workers; an actor. An earlier launch is not listened to.

    Ray starts it again if it dies. It then holds nothing, and fills as all sides send what they
    send all the time: workers their heartbeats, and the driver its orders.
    """

    def __init__(self) -> None:
        self._given: dict[str, Any] | None = None
        self._begin(0)

    def _begin(self, launch: int) -> None:
        """Forget everything: workers are launched anew."""
        self._launch = launch
        self._events: list[Event] = []
        self._heartbeats: dict[int, dict[str, Any]] = {}
        self._stacks: dict[int, dict[str, Any]] = {}
        self._orders: Orders = {"stop": False, "stacks": 0}
        self._outcome: dict[str, Any] | None = None
        self._failure: tuple[str, str] | None = None
        self._controller: Any = None

    def report(self, launch: int, what: str, *given: Any) -> Any:
        """Something of a worker or controller; returns what it asks for."""
        if launch > self._launch:
            self._begin(launch)
        return getattr(self, f"_{what}")(*given) if launch == self._launch else None

    def take(self, launch: int, orders: Orders) -> DriverUpdate:
        """What has come in, events only once, and what the workers are to do.

        Args:
            launch: whose.
            orders: to ``stop``, or to send their ``stacks`` (a number, raised).
        """
        if launch > self._launch:
            self._begin(launch)
        if orders["stacks"] != self._orders["stacks"]:
            self._stacks = {}
        self._orders = orders
        events, self._events = self._events, []
        now = time.monotonic()
        heartbeats = [
            Heartbeat.parse(
                fields
                | {
                    "silent_s": now - fields["heard"],
                    "still_s": fields["still_s"] + now - fields["heard"],
                    "waits": self._stacks.get(rank, {}).get("waits"),
                }
            )
            for rank, fields in sorted(self._heartbeats.items())
        ]
        stacks = {rank: message["text"] for rank, message in sorted(self._stacks.items())}
        return DriverUpdate(
            events, heartbeats, stacks, self._outcome, self._failure, self._controller
        )

    def give(self, given: dict[str, Any]) -> None:
        """Keep what workers need to start, secrets too: Ray logs no arguments of methods."""
        self._given = given

    def given(self) -> dict[str, Any] | None:
        """What was given; None to whom asks a mailbox that was started anew."""
        return self._given

    def _event(self, kind: str, fields: dict[str, Any]) -> None:
        self._events.append((kind, fields))

    def _heartbeat(self, rank: int, fields: dict[str, Any]) -> dict[str, Any]:
        self._heartbeats[rank] = fields | {"rank": rank, "heard": time.monotonic()}
        return self._orders

    def _stack(self, rank: int, fields: dict[str, Any]) -> None:
        self._stacks[rank] = fields

    def _finish(self, outcome: dict[str, Any]) -> None:
        self._outcome = outcome

    def _fail(self, kind: str, message: str) -> None:
        """The first one is kept, since it causes the others."""
        self._failure = self._failure or (kind, message)

    def _control(self, controller: list[Any]) -> None:
        (self._controller,) = controller


class Bridge:
    """A handle to a :class:`Mailbox`; may be sent to workers.

    Args:
        actor: the mailbox's handle; None starts one beside the driver.
        launch: which launch of the workers this end belongs to.

    Attributes:
        controller: a handle to Ray Train's controller, once :meth:`take` has found it.
    """

    def __init__(self, actor: Any = None, launch: int = 0) -> None:
        self.launch = launch
        self._orders: Orders = {"stop": False, "stacks": 0}
        self.controller: Any = None
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
        """The bridge of another launch; the mailbox forgets the one before."""
        bridge = Bridge(self.actor, launch)
        bridge.take()
        return bridge

    def emit(self, kind: str, fields: dict[str, Any]) -> None:
        """Send an event for people, without waiting for its arrival."""
        self.actor.report.remote(self.launch, "event", kind, fields)

    def report(self, what: str, *given: Any, timeout_s: float | None = None) -> Any:
        """Tell the mailbox something, and wait for what it asks for."""
        return ray.get(self.actor.report.remote(self.launch, what, *given), timeout=timeout_s)

    def order(self, name: Literal["stop", "stacks"], value: Any = True) -> None:
        """Ask all workers to do something; sent with the next :meth:`take`."""
        self._orders = {**self._orders, name: value}

    def take(self) -> DriverUpdate:
        """See :meth:`Mailbox.take`.

        Raises:
            WorkerLostError: the mailbox died, and does not come back.
        """
        try:
            update: DriverUpdate = ray.get(
                self.actor.take.remote(self.launch, self._orders), timeout=_ANSWER_S
            )
        except ray.exceptions.RayError as error:
            raise WorkerLostError(
                f"the driver's mailbox is lost ({type(error).__name__})"
            ) from error
        # It is told once, and not again to a mailbox that was started anew.
        self.controller = update.controller or self.controller
        return update._replace(controller=self.controller)

    def give(self, given: dict[str, Any]) -> None:
        """Leave in the mailbox what workers need to start. Nothing of it is logged or stored."""
        ray.get(self.actor.give.remote(given))

    def given(self) -> dict[str, Any]:
        """What the driver has given; its variables are in the environment from now on.

        Raises:
            WorkerLostError: the mailbox was lost meanwhile.
        """
        given: dict[str, Any] | None = ray.get(self.actor.given.remote())
        if given is None:
            raise WorkerLostError("what the driver had given to the workers is lost")
        set_env(given["environment"])
        return given
