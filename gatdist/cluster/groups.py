"""Groups of workers on Ray, one after the other, each of which runs a function together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO, cast

from gatdist.cluster.connection import (
    connected,
    require_temporary_folder,
    temporary_log,
)  # sets up Ray's import

# isort: split
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.network import choose_interface, interfaces, unused_port
from gatdist.cluster.nodes import Nodes
from gatdist.cluster.policies import needs_of, room_for, this_machine, too_small
from gatdist.cluster.processes import output_to_file
from gatdist.cluster.rendezvous import join
from gatdist.common.errors import (
    ClusterError,
    GatdistError,
    WorkerLostError,
    lost_worker,
    rebuilt,
    summary,
)
from gatdist.config import ClusterConfig

_LOOK_S = 0.2
_ROOM_S = 30.0
_START_S = 300.0
_TIMEOUT_S = 120.0


def require_room_here(workers: int) -> None:
    """Raise ClusterError if this machine has no room for so many workers."""
    has = this_machine()
    cluster = ClusterConfig(workers=workers)
    needs = needs_of(cluster, has)
    if room_for(needs, [has]) < workers:
        raise too_small(cluster, workers, needs, has)


@contextmanager
def groups(address: str, most: int) -> Iterator[Groups]:
    """Connect to a Ray with room for groups of up to ``most`` workers.

    Without an address, a Ray is started on this machine, which ends with the context.

    Raises:
        ClusterError: the address does not answer, or the cluster is too small.
    """
    cluster = ClusterConfig(workers=most, address=address)
    require_temporary_folder(for_ray=not address)
    with temporary_log() as log, output_to_file(log) as terminal, connected(address, log):
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        needs = needs_of(cluster, has)
        if Nodes.now().capacity(needs) < most:
            raise too_small(cluster, most, needs, has)
        yield Groups(needs, terminal, log)


class Groups:
    """Starts groups of workers with these needs; made by :func:`groups`."""

    def __init__(self, needs: dict[str, float], terminal: TextIO, log: Path) -> None:
        self._needs, self._terminal, self._log = needs, terminal, log

    def together(
        self, world_size: int, function: Callable[..., Any], *args: Any
    ) -> tuple[list[Any], float]:
        """Run ``function(comm, report, interface, *args)`` in new workers, which then end.

        ``comm`` is the workers' communicator, ``report`` shows lines of progress (of worker 0), and
        ``interface`` is the name of the network interface to the other workers, "" for loopback.
        The function is defined at the top of a module that all hosts have.

        Returns:
            The results by rank, and the seconds until the group could communicate.

        Raises:
            WorkerLostError: there is no room at present, or a worker died.
            GatdistError: what ``function`` raised, of the same class.
        """
        began = time.monotonic()
        bridge = Bridge()
        with self._placed(world_size) as actors:
            self._join(actors)
            start_s = time.monotonic() - began
            tasks = [actor.run.remote(function, bridge, args) for actor in actors]
            return self._results(tasks, bridge), start_s

    @contextmanager
    def _placed(self, world_size: int) -> Iterator[list[Any]]:
        """Yield actors with resources of their own, those of a host next to each other."""
        place = placement_group([self._needs] * world_size, strategy="PACK")
        actors: list[Any] = []
        try:
            if not place.wait(_ROOM_S):
                raise WorkerLostError(
                    f"no room for {world_size} workers after {_ROOM_S:.0f} s: others use the "
                    "cluster"
                )
            actors = [self._actor(place, index) for index in range(world_size)]
            addresses = self._get([actor.look.remote() for actor in actors])
            found = zip(addresses, actors, strict=True)
            yield [actor for _, actor in sorted(found, key=itemgetter(0))]
        finally:
            for actor in actors:
                ray.kill(actor)
            remove_placement_group(place)

    def _actor(self, place: PlacementGroup, index: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=index)
        cpus, gpus = self._needs["CPU"], self._needs.get("GPU", 0)
        options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
        return ray.remote(cast(Any, _Worker)).options(**options).remote()

    def _join(self, actors: Sequence[Any]) -> None:
        (rendezvous,) = self._get([actors[0].rendezvous.remote()])
        threads, on_gpu = int(self._needs["CPU"]), "GPU" in self._needs
        joining = [
            actor.join.remote(rank, len(actors), rendezvous, threads, on_gpu)
            for rank, actor in enumerate(actors)
        ]
        if reasons := [reason for reason in self._get(joining) if reason]:
            raise rebuilt(ClusterError.__name__, reasons[0])

    def _get(self, tasks: Sequence[Any]) -> list[Any]:
        try:
            found: list[Any] = ray.get(list(tasks), timeout=_START_S)
        except ray.exceptions.RayError as error:
            raise self._lost("the workers did not start", error) from error
        return found

    def _results(self, tasks: Sequence[Any], bridge: Bridge) -> list[Any]:
        """Return each rank's result, or raise the first failure at once: others may wait for it."""
        waiting = list(tasks)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK_S)
            for _, fields in bridge.take().events:
                self._terminal.write(f"{fields['text']}\n")
            for task in done:
                try:
                    error, message, _ = ray.get(task)
                except ray.exceptions.RayError as lost:
                    raise self._lost(f"worker {tasks.index(task)} died", lost) from lost
                if error:
                    raise rebuilt(error, message)
        return [result for _, _, result in ray.get(list(tasks))]

    def _lost(self, what: str, error: Exception) -> GatdistError:
        return WorkerLostError(f"{what} ({summary(error)}). Ray's log: {self._log}")


class _Worker:
    """One worker of a group; an actor."""

    def __init__(self) -> None:
        self._rank = 0
        self._device: Any = None

    def look(self) -> str:
        """Choose the network interface, and return this host's address."""
        self._address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        choose_interface(self._address)
        return self._address

    def rendezvous(self) -> tuple[str, int]:
        """Return this host's address and a free port."""
        return self._address, unused_port(self._address)

    def join(
        self, rank: int, world_size: int, master: tuple[str, int], threads: int, on_gpu: bool
    ) -> str:
        """Form the process group; returns why that failed, or ""."""
        import torch

        torch.set_num_threads(threads)
        self._rank = rank
        self._device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        try:
            join(
                "nccl" if on_gpu else "gloo",
                self._device,
                rank=rank,
                world_size=world_size,
                master=master,
                host=f"{socket.gethostname()} ({self._address})",
                arrive_s=_TIMEOUT_S,
                connect_s=_TIMEOUT_S,
            )
        except ClusterError as error:
            return str(error)
        return ""

    def run(
        self, function: Callable[..., Any], bridge: Bridge, args: tuple[Any, ...]
    ) -> tuple[str, str, Any]:
        """Return class and message of a failure ("" for none), and the result."""
        from gatdist.parallel.communicator import TorchCommunicator

        def report(text: str) -> None:
            if self._rank == 0:
                bridge.emit("progress", {"text": text})

        try:
            result = function(TorchCommunicator(self._device), report, _interface(), *args)
        except GatdistError as error:
            return type(error).__name__, str(error), None
        except RuntimeError as error:
            if lost := lost_worker(error, f"worker {self._rank}"):
                return type(lost).__name__, str(lost), None
            raise
        return "", "", result


def _interface() -> str:
    """Return the network interface that the process group uses; "" for loopback."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return "" if interfaces().get(name, "127.").startswith("127.") else name
