"""The device and CPUs of each worker, gathered from all workers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gatdist.common.host import SYS, Place, format_cpus, plan_places
from gatdist.parallel.communicator import Communicator


class Device(NamedTuple):
    """What a worker computes on."""

    name: str  # "cpu" or "cuda:3"
    model: str = ""  # name, memory and compute capability; "" for the CPU
    pci: str = ""  # address as sysfs names it; "" for the CPU, or if torch does not have it

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Describe a device."""
        if device.type != "cuda":
            return cls(str(device))
        found = torch.cuda.get_device_properties(device)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        model = f"{found.name}, {memory}, compute capability {found.major}.{found.minor}"
        parts = [getattr(found, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
        pci = "{:04x}:{:02x}:{:02x}.0".format(*parts) if min(parts) >= 0 else ""
        return cls(str(device), model, pci)


@contextmanager
def places(
    comm: Communicator,
    *,
    binds: bool,
    describe: Callable[[torch.device], Device] = Device.of,
    sys: Path = SYS,
) -> Iterator[list[dict[str, Any]]]:
    """Yield what each worker runs on, by rank; all workers enter together.

    The values are ``host``, ``device``, ``gpu`` (its model), ``numa_node``, and ``cpus``: the
    worker's share in the kernel's format (see :func:`~gatdist.common.host.plan_places`).

    Args:
        comm: the workers.
        binds: restrict this thread, and those that it starts, to its share within the context,
            unless the launcher has given the workers of this host different CPUs.
        describe: describes this worker's device.
        sys: root of sysfs.
    """
    before, device = os.sched_getaffinity(0), describe(comm.device)
    mine = {"host": socket.gethostname(), "pci": device.pci, "cpus": format_cpus(before)}
    workers = comm.all_gather_object(mine)
    local = [rank for rank, worker in enumerate(workers) if worker["host"] == mine["host"]]
    own = _on_host([workers[rank] for rank in local], before, sys)[local.index(comm.rank)]
    planned = {"numa_node": own.numa_node, "cpus": format_cpus(own.cpus)}
    found = comm.all_gather_object(
        {"host": mine["host"], "device": device.name, "gpu": device.model} | planned
    )
    binds = binds and set(own.cpus) != before
    if binds:
        os.sched_setaffinity(0, own.cpus)
    try:
        yield found
    finally:
        if binds:
            os.sched_setaffinity(0, before)


def _on_host(workers: Sequence[dict[str, Any]], allowed: set[int], sys: Path) -> list[Place]:
    """Return the places of the workers of this host."""
    plan = plan_places([worker["pci"] for worker in workers], allowed, sys)
    if len({worker["cpus"] for worker in workers}) == 1:
        return plan
    # The launcher has divided the CPUs.
    return [place._replace(cpus=tuple(sorted(allowed))) for place in plan]
