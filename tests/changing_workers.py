"""Workers that come and go in a run, in processes of their own, without Ray."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import current_process, get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from faulty_runs import HEAD
from gatdist.cluster.membership import LeftBehindError
from gatdist.cluster.roster import Roster, Seat
from gatdist.runs import Checkpoints
from gatdist.storage import Store

PRELOADED = ["pytest", "hypothesis", "torch.distributed", "gatdist.training.loop"]


_KILLS = """
kills = {kills}
def kill_once(place, rank, step):
    def kill():
        try:
            (folder / f"{{place.replace('/', '_')}}-{{rank}}-{{step}}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
    fail_at(place, kill, rank=rank, step=step, attempt=None)
for each in kills:
    kill_once(*each)
"""


def plugin(kills: list[tuple[str, int, int]], more: str = "") -> str:
    """Return a plugin that kills a worker once at each (place, rank, step)."""
    return HEAD + _KILLS.format(kills=kills) + more


# The result has the same bytes on 1 to 4 workers, with adaptive state.
CANONICAL = [
    "run.global_batch=16",
    "run.reduction=canonical",
    "run.virtual_workers=4",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    'game.augmentation={name="ada", adjust_samples=20000}',
]

# Appended to a plugin: checkpoints of tiny networks, too, are written by all workers.
SMALL_FILES = """
from gatdist.runs import sharding
sharding.FILE_BYTES = 2**12
"""


def digest(folder: Any) -> str:
    """Return that of a run's newest checkpoint."""
    newest = Checkpoints(Store(str(folder)).child("checkpoints")).newest()
    assert newest
    return newest.digest()


def changes(workers: Workers) -> list[tuple[int, int, int]]:
    """Return (workers, samples seen, undone steps) of each change of workers."""
    fields = [fields for kind, fields in workers.served.events() if kind == "members"]
    return [(f["workers"], f["samples_seen"], f["steps_undone"]) for f in fields]


class Served:
    """A roster that processes share, what workers report, and their outcomes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._outcomes: dict[str, Any] = {}
        self._steps: dict[str, tuple[str, int]] = {}
        self._stops = False

    def begin(self, sizes: list[int], members: list[str]) -> None:
        self._roster = Roster(sizes, members)

    def arrive(self, worker: str, meets_at: tuple[str, int]) -> None:
        with self._lock:
            self._roster.arrive(worker, meets_at, worker)

    def lose(self, worker: str) -> None:
        with self._lock:
            self._roster.lose(worker, f"{worker} died")

    def leave(self, worker: str) -> None:
        with self._lock:
            self._roster.leave(worker)

    def stop(self) -> None:
        with self._lock:
            self._stops = True
            self._roster.accept_any_size()

    def seat(self, worker: str) -> tuple[Seat | None, bool]:
        with self._lock:
            self._roster.look()
            return self._roster.seat(worker), self._roster.is_member(worker)

    def orders(self, worker: str, phase: str, step: int) -> tuple[int, bool, bool, bool]:
        with self._lock:
            self._steps[worker] = phase, step
            roster = self._roster
            return roster.epoch, roster.has_ended, roster.is_due, self._stops

    def steps(self) -> dict[str, tuple[str, int]]:
        return dict(self._steps)

    def emit(self, kind: str, fields: dict[str, Any]) -> None:
        self._events.append((kind, fields))

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return list(self._events)

    def finish(self, worker: str, outcome: Any) -> None:
        self._outcomes[worker] = outcome
        if isinstance(outcome, dict):
            self._roster.end()

    def outcomes(self) -> dict[str, Any]:
        return dict(self._outcomes)


class _Manager(BaseManager):
    pass


@cache
def _the_one() -> Served:
    """Return what all processes share; called in the manager's process."""
    return Served()


_Manager.register("served", callable=_the_one)


class _Channel:
    def __init__(self, served: Any, worker: str) -> None:
        self.served, self.worker, self.due = served, worker, False

    def arrive(self, meets_at: tuple[str, int]) -> None:
        self.served.arrive(self.worker, meets_at)

    def seat(self) -> Seat | None:
        seat, is_member = self.served.seat(self.worker)
        if not is_member:
            raise LeftBehindError("this worker does not take part any more")
        return seat

    def is_due(self) -> bool:
        return self.due


def _free_address() -> tuple[str, int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return "127.0.0.1", listener.getsockname()[1]


def _work(
    address: Any, key: bytes, worker: str, seat: Seat | None, config: Any, run_dir: str, env: Any
) -> None:
    os.environ.update(env)
    sys.path.append(str(Path(run_dir).parent))  # of plugins
    import torch
    import torch.distributed as dist

    from gatdist.cluster.membership import RosterMembership
    from gatdist.cluster.rendezvous import join, set_collective_timeout
    from gatdist.common.errors import GatdistError
    from gatdist.parallel.communicator import LocalCommunicator, TorchCommunicator
    from gatdist.parallel.members import Members
    from gatdist.training.loop import run
    from gatdist.training.progress import Progress

    torch.set_num_threads(1)
    device = torch.device("cpu")
    manager = _Manager(address=address, authkey=key)
    manager.connect()
    served = manager.served()  # type: ignore[attr-defined]
    channel, progress = _Channel(served, worker), Progress()
    present = [0]

    def form(seat: Seat) -> Any:
        if seat.world_size == 1:
            present[0] = seat.epoch
            return LocalCommunicator(device), lambda: None
        abort = join(
            "gloo",
            device,
            rank=seat.rank,
            world_size=seat.world_size,
            master=seat.master,
            host=worker,
            arrive_s=20,
            connect_s=20,
        )
        set_collective_timeout(86400)
        present[0] = seat.epoch
        return TorchCommunicator(device), abort

    def end() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    first, abort = form(seat) if seat else (None, lambda: None)
    membership = RosterMembership(channel, form, end, _free_address, abort, wait_s=120)
    over, stops = threading.Event(), threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            report = progress.report()
            phase, step = report["phase"], report["step"]
            epoch, has_ended, channel.due, is_stop = served.orders(worker, phase, step)
            if is_stop:
                stops.set()
            if has_ended and epoch == present[0]:
                membership.abort()

    threading.Thread(target=beat, daemon=True).start()
    try:
        comm = Members(first, membership, device)
        store, shows = Store(run_dir), served.emit
        outcome = run(config, comm, store, should_stop=stops.is_set, emit=shows, progress=progress)
        served.finish(worker, outcome)
    except GatdistError as error:
        served.finish(worker, f"{type(error).__name__}: {error}")
    finally:
        over.set()
        end()


class Workers:
    """Processes that train together, and may be killed, stopped and added.

    Args:
        sizes: numbers of workers that an epoch may have.
        count: number of workers to begin with.
        config: of the run.
        run_dir: its folder.
    """

    def __init__(self, sizes: list[int], count: int, config: Any, run_dir: str) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        names = [f"w{i}" for i in range(count)]
        self._manager = _Manager(ctx=self._context)
        self._manager.start()
        self.served: Any = self._manager.served()  # type: ignore[attr-defined]
        self.served.begin(sizes, names)
        self._config, self._run_dir = config, run_dir
        self.processes: dict[str, Any] = {}
        hosts, master = dict(enumerate(names)), _free_address()
        for rank, name in enumerate(names):
            self._start(name, Seat(1, rank, count, master, hosts))

    def add(self) -> str:
        """Start one more worker, which joins the run; return its name."""
        name = f"w{len(self.processes)}"
        self._start(name, None)
        return name

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a worker a signal; one that is killed counts as lost once it is."""
        os.kill(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes[name].join()
            self.served.lose(name)

    def lose_dead(self) -> set[str]:
        """Take note of workers that have died; return their names."""
        dead = {name for name, process in self.processes.items() if process.exitcode}
        for name in dead:
            self.served.lose(name)
        return dead

    def until(self, condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Wait until ``condition`` is true, and return its value."""
        until = time.monotonic() + limit_s
        while not (found := condition()):
            self.lose_dead()
            assert time.monotonic() < until, (self.served.steps(), self.served.outcomes())
            time.sleep(0.01)
        return found

    def step_of(self, name: str) -> int:
        return self.served.steps().get(name, ("", -1))[1]

    def phase_of(self, name: str) -> str:
        return self.served.steps().get(name, ("", -1))[0]

    def finish(self, limit_s: float = 120.0) -> dict[str, Any]:
        """Wait for the end of all workers, and return their outcomes."""
        processes = self.processes.values()
        self.until(lambda: not any(process.is_alive() for process in processes), limit_s)
        return self.served.outcomes()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self._manager.shutdown()

    def _start(self, name: str, seat: Seat | None) -> None:
        arguments = (
            self._manager.address,
            bytes(current_process().authkey),
            name,
            seat,
            self._config,
            self._run_dir,
            dict(os.environ),
        )
        process = self._context.Process(target=_work, args=arguments)
        process.start()
        self.processes[name] = process
