"""Some processes on this machine in a gloo group of their own, each answering once."""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from gatdist.common.errors import GatdistError, WorkerLostError
from gatdist.parallel.communicator import Communicator

Report = Callable[[str], None]
_END_S = 10.0


def together(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    report: Report,
    silence_s: float = 300.0,
) -> list[Any]:
    """Run ``function(comm, report, *args)`` in new processes; what it returned, by rank.

    All processes have ended when this returns or raises.

    Args:
        world_size: how many.
        function: defined at the top of a module, since each process imports it.
        args: picklable, as the results must be.
        report: gets the lines of progress that the first process tells.
        silence_s: for how long nothing may be heard of any of them.

    Raises:
        WorkerLostError: a process died, or nothing was heard of them for too long.
        GatdistError: one of them raised something, which is told.
    """
    context = get_context("spawn")
    links: dict[Connection, int] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                links[ours] = rank
                place = rank, world_size, f"{folder}/rendezvous", silence_s
                process = context.Process(
                    target=_member, args=(*place, theirs, function, args), daemon=True
                )
                process.start()
                processes.append(process)
                theirs.close()  # so that the death of a process is the end of its pipe
            results = _listen(links, report, silence_s)
            for process in processes:
                process.join(_END_S)
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            for link in links:
                link.close()


def _listen(links: Mapping[Connection, int], report: Report, silence_s: float) -> dict[int, Any]:
    """Each rank's result, or the first failure at once: the others may wait for it for ever."""
    results: dict[int, Any] = {}
    while len(results) < len(links):
        waiting = [link for link, rank in links.items() if rank not in results]
        ready = [link for link in waiting if link in wait(waiting, silence_s)]
        if not ready:
            ranks = ", ".join(str(links[link]) for link in waiting)
            raise WorkerLostError(f"nothing heard of process {ranks} for {silence_s:g} s")
        for link in ready:
            try:
                kind, value = link.recv()
            except EOFError:
                raise WorkerLostError(f"process {links[link]} died without an answer") from None
            if kind == "progress":
                report(value)
            elif kind == "failure":
                raise GatdistError(f"process {links[link]} failed:\n{value}")
            else:
                results[links[link]] = value
    return results


def _member(
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    link: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from gatdist.parallel.communicator import TorchCommunicator

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us

    def report(text: str) -> None:
        if rank == 0:
            link.send(("progress", text))

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        comm: Communicator = TorchCommunicator(torch.device("cpu"))
        answer = "result", function(comm, report, *args)
        dist.destroy_process_group()
    except Exception:
        answer = "failure", traceback.format_exc()
    link.send(answer)
