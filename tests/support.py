"""What several tests share: process groups, gatdist's commands, waiting without hoping."""

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

from gatdist.common.errors import GatdistError

# Only what hangs takes so long, also beside other processes on a slow machine. A test that asserts
# how soon something happens compares it with what it would take otherwise, or counts.
HANG_S = 300.0


@contextmanager
def refused(kind: type[GatdistError], subject: str = "") -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block must raise an error of this class, about this field or file.

    Args:
        kind: the class; a subclass will do.
        subject: the error's subject, or its end after a ``/`` or a blank; "" for any.
    """
    with pytest.raises(kind) as caught:
        yield caught
    found = getattr(caught.value, "subject", "")
    is_about = f" {found}".endswith((f" {subject}", f"/{subject}"))
    assert is_about or not subject, str(caught.value)


PRELOADED = ["pytest", "hypothesis", "torch.distributed", "gatdist.training.loop"]


def spawn(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = HANG_S
) -> list[Any]:
    """Run ``function(comm, *args)`` in a real gloo process group; its results by rank.

    Args:
        world_size: number of processes.
        function: defined at the top of a module, since each process imports it.
        args: picklable; the results must be so too.
        timeout_s: past it, all processes are killed and the test fails.
    """
    # Forked from a process that has imported what takes seconds, and has no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_member,
                    args=(
                        rank,
                        world_size,
                        f"{folder}/rendezvous",
                        timeout_s,
                        theirs,
                        dict(os.environ),
                        function,
                        args,
                    ),
                )
                process.start()
                theirs.close()  # so that the death of a process is the end of its pipe
                processes.append(process)
                ranks[ours] = rank
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
    """Each rank's result, or the first failure at once: the others may wait for it for ever."""
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
    # Pickled here: a tensor sent as an object is a file descriptor, which dies with this process.
    connection.send_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def start_gatdist(
    *args: object, cwd: Path, env: Mapping[str, str | None] | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """Start ``gatdist ARGS`` in a process group of its own. See :func:`end_group`.

    Output is piped, unless ``stdout`` or ``stderr`` says where it goes.
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
    """Kill whatever is left of the process group that ``process`` leads, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def marked_processes(mark: str) -> list[int]:
    """Ids of the processes whose environment, inherited from the first, holds ``mark``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


@contextmanager
def ray_head(
    folder: Path, *options: str, env: Mapping[str, str], port: int | None = None
) -> Iterator[str]:
    """HOST:PORT of a Ray on this machine, ended by its processes' ids.

    Args:
        folder: for what it prints.
        options: of ``ray start --head``.
        env: added to the environment.
        port: of its head; None takes a free one.
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
        # `ray stop` would end every Ray on this machine.
        for process in marked_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = HANG_S) -> Any:
    """Poll until ``condition()`` is true, and return its value; past the time, fail."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.02)
    return value


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Where the programs are that tests need; some `make setup-system` puts into .tools.
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
    """Paths of programs. Unless all are installed, skip; in CI, where set-up does it, fail."""
    found = {program: shutil.which(program, path=PROGRAMS) for program in programs}
    missing = [program for program, path in found.items() if path is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (make setup-system)"
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(reason)
        pytest.skip(reason)
    return [path for path in found.values() if path]
