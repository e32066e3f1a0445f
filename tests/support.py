"""Shared helpers: process groups, gatdist commands, and polling with a timeout."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from gatdist.common.errors import GatdistError
from gatdist.config import Config
from gatdist.data.order import WorkerShare
from gatdist.parallel.communicator import Communicator

# Only a hang takes this long, even on a slow, busy machine. A test of how soon something
# happens compares it with the alternative, or counts.
HANG_S = 300.0


@contextmanager
def refused(kind: type[GatdistError], subject: str = "") -> Iterator[pytest.ExceptionInfo[Any]]:
    """Assert that the block raises an error of this class, about this field or file.

    Args:
        kind: The class, or a base class of it.
        subject: The error's subject, or its end after a ``/`` or a space; "" for any.
    """
    with pytest.raises(kind) as caught:
        yield caught
    found = getattr(caught.value, "subject", "")
    is_about = f" {found}".endswith((f" {subject}", f"/{subject}"))
    assert is_about or not subject, str(caught.value)


def own_samples(config: Config, comm: Communicator) -> torch.Tensor:
    """Return the places of a worker's samples among all those of a step, int64 [n]."""
    share = WorkerShare.from_config(config, comm.rank, comm.world_size)
    return torch.from_numpy(share.positions(0, share.local_batch))


PRELOADED = ["pytest", "hypothesis", "torch.distributed", "gatdist.training.loop"]


def spawn(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = HANG_S
) -> list[Any]:
    """Run ``function(comm, *args)`` in a real gloo process group; return the results by rank.

    Args:
        world_size: Number of processes.
        function: A module-level function, since each process imports it.
        args: Must be picklable, as must the results.
        timeout_s: After this time, all processes are killed and the test fails.
    """
    # Forked from a process that has imported the slow modules and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_member,
                    args=(
                        rank,
                        world_size,
                        f"{folder}/rendezvous",
                        timeout_s,
                        sender,
                        dict(os.environ),
                        function,
                        args,
                    ),
                )
                process.start()
                sender.close()  # so that the pipe ends when the process dies
                processes.append(process)
                ranks[receiver] = rank
            results = _results(ranks, deadline)
            for process in processes:
                process.join(10)
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            for connection in ranks:
                connection.close()


def _results(ranks: Mapping[Connection, int], deadline: float) -> dict[int, Any]:
    """Return each rank's result, or raise the first failure at once: other ranks may hang."""
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [connection for connection, rank in ranks.items() if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            pytest.fail(
                f"no answer in time from ranks {[ranks[connection] for connection in waiting]}"
            )
        for connection in ready:
            rank = ranks[connection]
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                pytest.fail(f"rank {rank} died without an answer")
            if not succeeded:
                pytest.fail(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return results


def _member(
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    connection: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    from gatdist.parallel.communicator import TorchCommunicator

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        outcome = True, function(TorchCommunicator(torch.device("cpu")), *args)
    except BaseException:
        outcome = False, traceback.format_exc()
    # Pickled here: a tensor sent as an object is a file descriptor, which dies with the process.
    connection.send_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def start_gatdist(
    *args: object, cwd: Path, env: Mapping[str, str | None] | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """Start ``gatdist ARGS`` in its own process group. See :func:`end_group`.

    Output is piped, unless ``stdout`` or ``stderr`` is given.
    """
    requested = os.environ | dict(env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "gatdist", *map(str, args)],
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        text=True,
        cwd=cwd,
        env={name: value for name, value in requested.items() if value is not None},
        start_new_session=True,
    )


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill the remaining processes of the group that ``process`` leads, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def marked_processes(mark: str) -> list[int]:
    """Return ids of processes whose inherited environment contains ``mark``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


@contextmanager
def ray_head(
    folder: Path, *options: str, env: Mapping[str, str], port: int | None = None
) -> Iterator[str]:
    """Start a Ray head on this machine, yield its HOST:PORT, and stop it by process id.

    Args:
        folder: Folder for its output.
        options: Options of ``ray start --head``.
        env: Variables added to the environment.
        port: Port of the head; None takes a free one.
    """
    port = port or free_port()
    mark = f"gatdist-ray-{port}"
    command = [
        *(Path(sys.executable).parent / "ray", "start", "--head", f"--port={port}"),
        *("--include-dashboard=false", "--node-ip-address=127.0.0.1", *options),
    ]
    try:
        with (folder / "start.log").open("wb") as output:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "MARK": mark} | dict(env),
                check=True,
                timeout=300,
            )
        yield f"127.0.0.1:{port}"
    finally:
        # `ray stop` would stop every Ray on this machine.
        for process in marked_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = HANG_S) -> Any:
    """Poll until ``condition()`` is true and return its value; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.02)
    return value


def free_port() -> int:
    """Return a free TCP port on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Folders of programs that tests need; `make setup-system` puts some into .tools.
TOOLS = Path(__file__).resolve().parent.parent / ".tools"
UNPACKED = ("nginx/usr/sbin", "prometheus/usr/bin", "slurm/usr/bin", "slurm/usr/sbin")
PROGRAMS = ":".join(
    [
        *(str(TOOLS / place) for place in ("node_modules/.bin", *UNPACKED)),
        os.environ["PATH"],
        "/usr/sbin",
    ]
)


def need(*programs: str) -> list[str]:
    """Return paths of programs. Skip unless all are installed; in CI, where they must be, fail."""
    found = {program: shutil.which(program, path=PROGRAMS) for program in programs}
    missing = [program for program, path in found.items() if path is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (make setup-system)"
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(reason)
        pytest.skip(reason)
    return [path for path in found.values() if path]
