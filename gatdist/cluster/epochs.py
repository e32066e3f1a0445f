"""A Ray worker's way from one epoch of a run to the next."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.membership import LeftBehindError, RosterMembership
from gatdist.cluster.network import unused_port
from gatdist.cluster.rendezvous import DAY_S, join, set_collective_timeout
from gatdist.cluster.roster import Address, Seat
from gatdist.common.errors import GatdistError, WorkerLostError
from gatdist.config import Config
from gatdist.parallel.communicator import Communicator, LocalCommunicator, TorchCommunicator

_ANSWER_S = 30.0
# Workers that arrive for an epoch are up: only their network can delay them.
_CONNECT_S = 20.0

# Fails the collectives of the group that Ray Train's backend has formed in this process.
abort_first: Callable[[], None] = lambda: None  # noqa: E731


class RunIsOver(GatdistError):
    """The run has ended while this worker waited to join it."""


def this_worker() -> str:
    """Return the name of this worker in the roster, Ray's id of it."""
    return str(ray.get_runtime_context().get_actor_id())


class RosterChannel:
    """The way of the worker with this name to the roster, through the driver's mailbox.

    Attributes:
        due: whether the workers are to change, as of the last heartbeat.
        stops: set once the driver orders a stop.
    """

    def __init__(self, bridge: Bridge, worker: str) -> None:
        self._bridge, self._worker = bridge, worker
        self.due, self.stops = False, threading.Event()

    def arrive(self, meets_at: Address) -> None:
        host = f"{socket.gethostname()} ({meets_at[0]})"
        self._report("arrive", self._worker, meets_at, host)

    def seat(self) -> Seat | None:
        seat, is_member, is_over, stops = self._report("seat", self._worker)
        if is_over:
            raise RunIsOver
        if not is_member:
            raise LeftBehindError("the run continues without this worker")
        if seat is None:
            return None
        self.due = False
        if stops:  # an epoch of any size, whose workers must know before they train
            self.stops.set()
        return Seat(*seat)

    def is_due(self) -> bool:
        return self.due

    def _report(self, what: str, *given: Any) -> Any:
        try:
            return self._bridge.report(what, *given, timeout_s=_ANSWER_S)
        except ray.exceptions.RayError as error:
            kind = type(error).__name__
            raise WorkerLostError(f"the driver's mailbox did not answer ({kind})") from error


def membership_of(
    config: Config, device: Any, channel: RosterChannel, *, is_joining: bool
) -> RosterMembership:
    """Return the membership of this worker, whom Ray Train's backend has connected if it starts."""

    def form(seat: Seat) -> tuple[Communicator, Callable[[], None]]:
        if seat.world_size == 1:
            return LocalCommunicator(device), lambda: None
        abort = join(
            config.cluster.backend,
            device,
            rank=seat.rank,
            world_size=seat.world_size,
            master=seat.master,
            host=seat.hosts[seat.rank],
            arrive_s=_CONNECT_S,
            connect_s=_CONNECT_S,
            known_hosts=seat.hosts,
        )
        set_collective_timeout(DAY_S)
        return TorchCommunicator(device), abort

    return RosterMembership(
        channel,
        form,
        _end,
        free_address,
        abort=(lambda: None) if is_joining else abort_first,
        wait_s=float("inf"),  # the driver sets a limit
    )


def _end() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> Address:
    """Return an address at which other workers can meet this one."""
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return address, unused_port(address)
