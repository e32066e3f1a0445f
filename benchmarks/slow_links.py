"""Scaling on hosts with slowed links, as ``gatdist bench scaling`` measures it, without Ray.

A token bucket (``tc … tbf``) limits each host's sending rate. Processes are kept for all rates.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from benchmarks.hosts import Hosts
from gatdist.bench.scaling.measure import Plan, measure, plan
from gatdist.bench.scaling.worker import take_turns
from gatdist.cluster.doctor.network import all_reduces
from gatdist.parallel.communicator import TorchCommunicator

# Mbit/s of each host; None: unlimited.
RATES = (None, 200.0, 100.0, 50.0)
COUNTS = (1, 2, 4)
_SIZE, _BATCH, _PORT = "dcgan64_w32", 16, 29555


def planned(counts: Sequence[int], rounds: int) -> Plan:
    """Plan weak scaling, so that each worker's computation is constant."""
    return plan(counts, sizes=[_SIZE], modes=["weak"], batch=_BATCH, rounds=rounds)


def measured(
    rounds: int, counts: Sequence[int] = COUNTS, rates: Sequence[float | None] = RATES
) -> list[dict[str, Any]]:
    """Return the result of ``gatdist bench scaling`` and all-reduces by workers, for each rate."""
    found = []
    with Hosts(max(counts), ray=False) as hosts:
        groups = {count: Group(hosts, count, rounds) for count in counts}
        try:
            for rate in rates:
                print(f"links: {f'{rate:g} Mbit/s' if rate else 'as they are'}", flush=True)
                for host in hosts.workers:
                    host.slow(rate)
                found.append({"mbit_per_s": rate, **_at_this_rate(groups, rounds)})
        finally:
            for group in groups.values():
                group.end()
    return found


def _at_this_rate(groups: dict[int, Group], rounds: int) -> dict[str, Any]:
    answers: dict[int, list[dict[str, Any]]] = {}

    def launch(world_size: int, function: Any, *args: Any) -> tuple[list[Any], float]:
        answers[world_size] = groups[world_size].go()
        return [answer["turns"] for answer in answers[world_size]], 0.0

    scaling = measure(planned(list(groups), rounds), launch)
    return {
        "scaling": scaling,
        "network": {str(count): message[0]["exchanges"] for count, message in answers.items()},
    }


class Group:
    def __init__(self, hosts: Hosts, count: int, rounds: int) -> None:
        first = hosts.workers[0]
        self.processes = [
            host.start(
                sys.executable, "-m", "benchmarks.slow_links", rank, count, first.address,
                _PORT + count, rounds, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            )
            for rank, host in enumerate(hosts.workers[:count])
        ]  # fmt: skip

    def go(self) -> list[dict[str, Any]]:
        for process in self.processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        found = []
        for process in self.processes:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline()))
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def member(rank: int, count: int, address: str, port: int, rounds: int) -> None:
    torch.set_num_threads(1)
    shared = TCPStore(address, port, is_master=rank == 0, world_size=count)
    for number, _ in enumerate(sys.stdin):
        exchanges: Sequence[Any] = ()
        if count > 1:
            store = PrefixStore(f"exchanges{number}", shared)
            exchanges = all_reduces(store, rank, count, "gloo")  # type: ignore[arg-type]
        store = PrefixStore(f"steps{number}", shared)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        comm = TorchCommunicator(torch.device("cpu"))
        turns = take_turns(comm, lambda text: None, "eth0", planned([count], rounds).works(count))
        dist.destroy_process_group()
        message = {"turns": turns, "exchanges": [one._asdict() for one in exchanges]}
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    member(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
