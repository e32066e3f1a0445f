"""Groups of workers on a Ray, one after the other, each of which runs a function together."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO, cast

from gatdist.cluster.connection import connected, require_temporary_folder  # sets up Ray's import

# isort: split
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.network import choose_interface, interfaces
from gatdist.cluster.nodes import Nodes
from gatdist.cluster.redirect import output_to_file
from gatdist.cluster.sizing import needs_of, of_this_machine, room_for, too_small
from gatdist.common.errors import (
    ClusterError,
    GatdistError,
    WorkerLostError,
    is_lost_connection,
    rebuilt,
    summary,
)
from gatdist.config import Config, parse_config

_OBJECT_STORE_BYTES = 100 * 2**20
_LOOK_S = 0.2
_ROOM_S = 30.0
_START_S = 120.0
_TIMEOUT_S = 120.0


def require_room_here(workers: int) -> None:
    """Raise ClusterError if so many workers have no room on this machine."""
    has = of_this_machine()
    config = _config("", workers)
    _require_room(config, room_for(needs_of(config, has), [has]), has)


@contextmanager
def groups(address: str, most: int) -> Iterator[Groups]:
    """Connected to a Ray on which there is room for groups of workers.

    Args:
        address: of a cluster; "" starts a Ray on this machine, which goes at the end.
        most: workers of the largest group.

    Raises:
        ClusterError: nobody answers at the address, or it has no room for so many.
    """
    config = _config(address, most)
    require_temporary_folder(for_ray=not address)
    log = Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"
    with output_to_file(log) as terminal, connected(address, log, _OBJECT_STORE_BYTES):
        has = ray.cluster_resources()  # type: ignore[no-untyped-call]
        needs = needs_of(config, has)
        _require_room(config, Nodes.now().capacity(needs), has)
        yield Groups(needs, config.cluster.placement.upper(), terminal, log)
    shutil.rmtree(log.parent)


def _config(address: str, workers: int) -> Config:
    """Of a run with so many workers, for those who judge its needs."""
    return parse_config(
        {
            "run": {"total_samples": workers, "global_batch": workers},
            "data": {"url": "none"},
            "cluster": {"workers": workers, "address": address},
        }
    )


def _require_room(config: Config, room: int, has: dict[str, float]) -> None:
    if room < config.cluster.max_workers:
        raise too_small(config, needs_of(config, has), has)


class Groups:
    """Starts groups; made by :func:`groups`.

    Args:
        needs: what a worker needs, by resource.
        placement: Ray's word for how workers are spread over the hosts.
        terminal: where progress is told.
        log: Ray's own, for messages.
    """

    def __init__(
        self, needs: dict[str, float], placement: str, terminal: TextIO, log: Path
    ) -> None:
        self._needs, self._placement, self._terminal, self._log = needs, placement, terminal, log

    def together(
        self, world_size: int, function: Callable[..., Any], *args: Any
    ) -> tuple[list[Any], float]:
        """Run ``function(comm, report, interface, *args)`` in new workers, which then end.

        ``comm`` is the workers' communicator, ``report`` takes lines of progress (of worker 0), and
        ``interface`` is the name of the network interface that leads to the other workers, "" where
        that is loopback.

        Args:
            world_size: how many workers.
            function: defined at the top of a module that all hosts have.
            args: for it; sent through Ray, as its results are.

        Returns:
            Its results, by rank, and the seconds from nothing to a group that communicates.

        Raises:
            WorkerLostError: there is no room at present, or a worker died.
            GatdistError: what ``function`` raised, of the same class.
        """
        began = time.monotonic()
        bridge = Bridge()
        with self._placed(world_size) as actors:
            self._meet(actors)
            start_s = time.monotonic() - began
            tasks = [actor.run.remote(function, bridge, args) for actor in actors]
            return self._results(tasks, bridge), start_s

    @contextmanager
    def _placed(self, world_size: int) -> Iterator[list[Any]]:
        """Actors in places of their own, those of a host beside one another."""
        place = placement_group([self._needs] * world_size, strategy=self._placement)
        actors: list[Any] = []
        try:
            if not place.wait(_ROOM_S):
                raise WorkerLostError(
                    f"there is no room for {world_size} workers after {_ROOM_S:.0f} s: others use "
                    "the cluster"
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
        rest = {name: n for name, n in self._needs.items() if name not in ("CPU", "GPU")}
        return (
            ray.remote(cast(Any, _Worker))
            .options(
                num_cpus=self._needs["CPU"],
                num_gpus=self._needs.get("GPU", 0),
                resources=rest,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    place, placement_group_bundle_index=index
                ),
            )
            .remote()
        )

    def _meet(self, actors: Sequence[Any]) -> None:
        (meeting,) = self._get([actors[0].meeting.remote()])
        threads, on_gpu = int(self._needs["CPU"]), "GPU" in self._needs
        joining = [
            actor.join.remote(rank, len(actors), meeting, threads, on_gpu)
            for rank, actor in enumerate(actors)
        ]
        if reasons := [reason for reason in self._get(joining) if reason]:
            raise ClusterError(
                "cluster",
                f"the workers can't reach one another ({reasons[0]})",
                hint="gatdist doctor on each host says which; open all ports between them",
            )

    def _get(self, tasks: Sequence[Any]) -> list[Any]:
        try:
            found: list[Any] = ray.get(list(tasks), timeout=_START_S)
        except ray.exceptions.RayError as error:
            raise self._lost("the workers did not start", error) from error
        return found

    def _results(self, tasks: Sequence[Any], bridge: Bridge) -> list[Any]:
        """Each rank's result, or the first failure at once: the others may wait for it for ever."""
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
    """One of a group; an actor."""

    def __init__(self) -> None:
        self._rank = 0
        self._device: Any = None

    def look(self) -> str:
        """This host's address, to which the process group's network interface is set."""
        self._address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        choose_interface(self._address)
        return self._address

    def meeting(self) -> str:
        """A free place at which all can meet."""
        with socket.socket() as listener:
            listener.bind((self._address, 0))
            return f"tcp://{self._address}:{listener.getsockname()[1]}"

    def join(self, rank: int, world_size: int, meeting: str, threads: int, on_gpu: bool) -> str:
        """Form the process group; "" or why that failed."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        self._rank = rank
        self._device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=meeting,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_TIMEOUT_S),
            )
            dist.all_reduce(torch.ones(1, device=self._device))
        except (RuntimeError, ValueError) as error:
            return summary(error)
        return ""

    def run(
        self, function: Callable[..., Any], bridge: Bridge, args: tuple[Any, ...]
    ) -> tuple[str, str, Any]:
        """Class and message of a failure, "" if there is none, and the result."""
        from gatdist.parallel.communicator import TorchCommunicator

        def report(text: str) -> None:
            if self._rank == 0:
                bridge.emit("progress", {"text": text})

        try:
            result = function(TorchCommunicator(self._device), report, _interface(), *args)
        except GatdistError as error:
            return type(error).__name__, str(error), None
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            return WorkerLostError.__name__, f"worker {self._rank} lost the others", None
        return "", "", result


def _interface() -> str:
    """The network interface that the process group was told to use; "" if that is loopback."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return "" if interfaces().get(name, "127.").startswith("127.") else name
