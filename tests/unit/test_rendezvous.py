"""Workers that do not start, or can't reach one another, are named; real gloo processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest

from gatdist.cluster import rendezvous
from gatdist.cluster.rendezvous import join
from gatdist.common.errors import ClusterError
from support import PRELOADED, free_port

LIMIT_S = 60


def member(rank: int, world_size: int, port: int, pipe: Any, before: Callable[[int], None]) -> None:
    """Join the group as ``rank``; send the error, or the group's size."""
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    before(rank)
    try:
        join(
            "gloo",
            torch.device("cpu"),
            rank=rank,
            world_size=world_size,
            master=("127.0.0.1", port),
            host=f"host-{rank}",
            arrive_s=3.0,
            connect_s=2.0,
        )
    except ClusterError as error:
        pipe.send((error.subject, str(error)))
    else:
        pipe.send(dist.get_world_size())
        dist.destroy_process_group()


def gather(world_size: int, ranks: list[int], before: Callable[[int], None]) -> list[Any]:
    """Start some of the processes of a group; return what each sent, None if it was stopped."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, pipes, processes = free_port(), [], []
    try:
        for rank in ranks:
            receiver, sender = context.Pipe(duplex=False)
            arguments = rank, world_size, port, sender, before
            processes.append(context.Process(target=member, args=arguments))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        found = []
        for pipe, rank in zip(pipes, ranks, strict=True):
            stopped = before is stop_rank_1 and rank == 1
            assert stopped or pipe.poll(LIMIT_S), f"rank {rank} sent nothing"
            found.append(None if stopped else pipe.recv())
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def at_once(rank: int) -> None:
    pass


def stop_rank_1(rank: int) -> None:
    """Stop the process of rank 1 between its arrival and the first collective."""
    from gatdist.cluster import rendezvous

    if rank == 1:
        rendezvous._connect = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)


def break_rank_2(rank: int) -> None:
    """Let rank 2 listen on an interface that does not exist."""
    if rank == 2:
        os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"


def test_all_arrive():
    assert gather(3, [0, 1, 2], at_once) == [3, 3, 3]


def test_worker_that_does_not_start_is_named():
    for subject, message in gather(3, [0, 2], at_once):
        assert subject == "workers"
        assert "worker 1 did not join" in message
        assert "worker 0 on host-0, worker 2 on host-2 did" in message


def test_missing_worker_0_is_named():
    for subject, message in gather(3, [1, 2], at_once):
        assert subject == "workers"
        assert "worker 0 did not start" in message


def test_worker_that_stops_before_the_first_collective_is_named():
    began = time.monotonic()
    first, _, last = gather(3, [0, 1, 2], stop_rank_1)
    assert time.monotonic() - began < LIMIT_S
    for subject, message in (first, last):
        assert subject == "workers"
        assert "worker 1 on host-1 did not answer" in message
        assert "worker 0 on host-0: " in message


def test_worker_that_can_not_listen_is_named_first():
    """The others only report that they waited for it."""
    for subject, message in gather(3, [0, 1, 2], break_rank_2):
        assert subject == "workers"
        assert "reach one another: worker 2 on host-2: " in message
        assert "nosuch0" in message


def at_a_port_in_use(rank: int) -> ClusterError:
    """Join with a server at the port that accepts connections and never answers."""
    import torch

    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ClusterError) as caught:
        join(
            "gloo",
            torch.device("cpu"),
            rank=rank,
            world_size=2,
            master=("127.0.0.1", other.getsockname()[1]),
            host="here",
            arrive_s=0.5,
            connect_s=0.5,
        )
    return caught.value


def test_port_in_use():
    assert at_a_port_in_use(0).subject == "MASTER_PORT"


@pytest.mark.timeout(30)
def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(rendezvous, "_BEYOND_S", 0.5)
    assert at_a_port_in_use(1).subject == "workers"
