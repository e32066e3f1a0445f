"""Training in processes that torchrun or srun has started, without Ray."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatdist.cluster.network import address_towards, choose_interface
from gatdist.cluster.preflight import HostInfo, Marker, host_info, marker, require_compatible
from gatdist.cluster.rendezvous import join, set_collective_timeout
from gatdist.common.errors import (
    ClusterError,
    ConfigError,
    GatdistError,
    lost_worker,
    rebuilt,
    summary,
)
from gatdist.config import Config
from gatdist.monitor.numbers import plural
from gatdist.storage import Store

if TYPE_CHECKING:
    from gatdist.monitor.console import Console
    from gatdist.parallel.communicator import Communicator
    from gatdist.training.interrupts import Interrupts
    from gatdist.training.progress import Progress

_LOOK_S = 1.0


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of a launcher."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return this process's place if a launcher has set RANK and WORLD_SIZE, else None.

    Raises:
        ConfigError: one of the other variables is missing, or a number is none.
    """
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(
                name,
                "the environment variable is not set, though RANK and WORLD_SIZE are",
                hint="Export it for all processes, or unset RANK and WORLD_SIZE",
            )

    def number(name: str, below: int | None = None) -> int:
        value = environment[name]
        if not value.isascii() or not value.isdecimal() or (below and int(value) >= below):
            limit = f" below {below}" if below else ""
            raise ConfigError(name, f"must be a whole number{limit}", value=value)
        return int(value)

    world_size = number("WORLD_SIZE")
    if not world_size:
        raise ConfigError("WORLD_SIZE", "must be above 0", value=0)
    rank = number("RANK", world_size)
    local_rank = number("LOCAL_RANK") if "LOCAL_RANK" in environment else 0
    port = number("MASTER_PORT", 2**16)
    return Launch(rank, world_size, local_rank, environment["MASTER_ADDR"], port)


def device_name(local_rank: int, visible_gpus: int) -> str:
    """Return the device of the process with this number on its host.

    A process that sees one GPU uses it: Slurm may give each task its own.

    Raises:
        ClusterError: there are too few GPUs.
    """
    if visible_gpus > 1 and local_rank >= visible_gpus:
        rule = f"the process sees {plural(visible_gpus, 'GPU')}"
        hint = "Start one process per GPU, which sees all GPUs of its host or its own only"
        raise ClusterError("LOCAL_RANK", rule, value=local_rank, hint=hint)
    if not visible_gpus:
        return "cpu"
    return f"cuda:{local_rank if visible_gpus > 1 else 0}"


def is_main() -> bool:
    """Return false in processes of a launcher other than rank 0."""
    launch = launched()
    return launch is None or launch.rank == 0


def train(
    config: Config,
    run_dir: str,
    launch: Launch,
    check: Callable[[Config], Iterable[str]],
    console: Console | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """Train in this process, one of ``launch.world_size`` that call this function.

    Args:
        config: of the run, the same in all processes.
        run_dir: its folder, which all processes reach.
        launch: the place of this process.
        check: called on rank 0 before training; returns warnings or raises.
        console: shows progress on rank 0.
        interrupts: requests the end of training.

    Returns:
        See :func:`gatdist.training.loop.run`.

    Raises:
        ClusterError: the processes can't reach one another or do not fit together.
        WorkerLostError: a process or its device failed.
        GatdistError: what the training loop raises.
    """
    import torch
    import torch.distributed as dist

    from gatdist.parallel.communicator import TorchCommunicator
    from gatdist.training.local import run_in_process
    from gatdist.training.progress import Progress

    config = _sized(config, launch)
    device = torch.device(device_name(launch.local_rank, torch.cuda.device_count()))
    automatic = "gloo" if device.type == "cpu" else "nccl"
    address = address_towards(launch.master_addr)
    choose_interface(address)
    join(
        automatic if config.cluster.backend == "auto" else config.cluster.backend,
        device,
        rank=launch.rank,
        world_size=launch.world_size,
        master=(launch.master_addr, launch.master_port),
        host=f"{socket.gethostname()} ({address})",
        arrive_s=config.cluster.startup_timeout_s,
        connect_s=config.cluster.heartbeat_timeout_s,
    )
    # Nobody ends workers that wait for one that hangs, as the driver does under Ray.
    set_collective_timeout(config.cluster.startup_timeout_s)
    here = f"worker {launch.rank} on {socket.gethostname()}"
    try:
        comm = TorchCommunicator(device)
        _agree(config, run_dir, comm, check, console, address)
        shown = console if comm.is_main else None
        threads, progress = config.cluster.cpus_per_worker, Progress()
        store = Store(run_dir, config.run.storage_options)
        with _stacks_written(progress, config.cluster.heartbeat_timeout_s, store, comm.rank, shown):
            return run_in_process(
                config, run_dir, comm, shown, interrupts, threads=threads, progress=progress
            )
    except RuntimeError as error:
        if lost := lost_worker(error, here):
            raise lost from error
        raise
    finally:
        dist.destroy_process_group()


def _sized(config: Config, launch: Launch) -> Config:
    """Return the configuration with as many workers as were started."""
    cluster, count = config.cluster, launch.world_size
    if cluster.max_workers > 1 and not cluster.min_workers <= count <= cluster.max_workers:
        raise ClusterError(
            "cluster.workers",
            f"WORLD_SIZE is {count}",
            value=cluster.workers,
            hint="Leave out --workers: the launcher says how many",
        )
    if cluster.address:
        raise ClusterError(
            "cluster.address",
            "is of Ray, which is not used in processes of another launcher",
            value=cluster.address,
            hint="Leave it out",
        )
    config = config.model_copy(update={"cluster": cluster.model_copy(update={"workers": count})})
    config.check_workers(count)
    return config


def _agree(
    config: Config,
    run_dir: str,
    comm: Communicator,
    check: Callable[[Config], Iterable[str]],
    console: Console | None,
    address: str,
) -> None:
    """Check the run on rank 0 and the hosts on every rank; raise the same error on all of them."""
    options = config.run.storage_options
    with ExitStack() as stack:
        try:
            said: dict[str, Any] = {}
            if comm.is_main:
                for message in check(config):
                    if console:
                        console.event("warning", {"message": message})
                name = stack.enter_context(marker(run_dir, options)).name
                said = {"marker": name, "now_s": time.time()}
        except BaseException as error:
            message = str(error) if isinstance(error, GatdistError) else summary(error)
            comm.broadcast_object({"error": [type(error).__name__, message]})
            raise
        said = comm.broadcast_object(said)
        if "error" in said:
            raise _reported(rebuilt(*said["error"]))
        expected = Marker(run_dir, dict(options), said["marker"])
        mine = host_info(address, expected, comm.device if comm.device.type == "cuda" else None)
        found = [HostInfo(*one) for one in comm.all_gather_object(list(mine))]
        exact = config.run.reduction == "canonical"
        try:
            for message in require_compatible(found, said["now_s"], exact=exact):
                if console and comm.is_main:
                    console.event("warning", {"message": message})
        except ClusterError as error:
            raise (error if comm.is_main else _reported(error)) from None


@contextmanager
def _stacks_written(
    progress: Progress, limit_s: float, store: Store, rank: int, console: Console | None
) -> Iterator[None]:
    """Write the stacks and last collectives of this process once it makes no progress.

    Under Ray the driver collects them. Here each process writes its own, since none watches all.
    """
    over = threading.Event()

    def watch() -> None:
        name = ""
        while not over.wait(_LOOK_S):
            report = progress.report()
            if report["lengthy"] or report["still_s"] < limit_s:
                name = ""
            elif not name:
                name = f"logs/stacks-{time.strftime('%Y%m%dT%H%M%S')}-rank-{rank}.txt"
                with suppress(GatdistError):
                    store.publish(name, progress.stacks()["text"].encode())
                if console:
                    still = f"no progress for {report['still_s']:.0f} s in {report['phase']!r}"
                    message = f"{still}; each process writes its stacks, such as {store.url}/{name}"
                    console.event("warning", {"message": message})

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _reported(error: GatdistError) -> GatdistError:
    error.reported = True
    return error
