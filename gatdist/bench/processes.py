"""A gloo process group on this machine."""

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

Report = Callable[[str], None]
_END_S = 10.0


def together(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    report: Report,
    silence_s: float = 300.0,
) -> list[Any]:
    """Run ``function(comm, report, *args)`` in new processes, and return the results by rank.

    Function, arguments and results are pickled. ``report`` gets rank 0's progress.

    Raises:
        WorkerLostError: A process died, or sent nothing for ``silence_s``.
        GatdistError: A process raised an error.
    """
    context = get_context("spawn")
    links: dict[Connection, int] = {}
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                mine, theirs = context.Pipe(duplex=False)
                links[mine] = rank
                place = rank, world_size, f"{folder}/rendezvous", silence_s
                process = context.Process(
                    target=_member, args=(*place, theirs, function, args), daemon=True
                )
                process.start()
                processes.append(process)
                theirs.close()  # so that the death of a process closes its pipe
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
    """Each rank's result; the first failure is raised at once, since the others may hang."""
    results: dict[int, Any] = {}
    while len(results) < len(links):
        waiting = [link for link, rank in links.items() if rank not in results]
        ready = [link for link in waiting if link in wait(waiting, silence_s)]
        if not ready:
            ranks = ", ".join(str(links[link]) for link in waiting)
            raise WorkerLostError(f"no message from process {ranks} for {silence_s:g} s")
        for link in ready:
            try:
                kind, value = link.recv()
            except EOFError:
                raise WorkerLostError(f"process {links[link]} died without a result") from None
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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

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
        answer = "result", function(TorchCommunicator(torch.device("cpu")), report, *args)
        dist.destroy_process_group()
    except Exception:
        answer = "failure", traceback.format_exc()
    link.send(answer)
