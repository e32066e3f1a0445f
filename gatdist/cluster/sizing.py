"""How many workers a run has: policies without Ray, which look at numbers and return decisions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gatdist.common.errors import ClusterError
from gatdist.config import Config

_HOUR_S = 3600.0


def of_this_machine() -> dict[str, float]:
    """What this machine has to give, by resource, as a Ray of our own would count it."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def needs_of(config: Config, has: Mapping[str, float], *, grows: bool = False) -> dict[str, float]:
    """What each worker needs, by resource.

    Args:
        config: of the run.
        has: what the cluster has.
        grows: whether an autoscaler may bring more.

    Raises:
        ClusterError: whether workers are to have GPUs can't be told by what is there.
    """
    cluster = config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = int(has.get("GPU", 0) > 0)
        if grows and not gpus:
            raise ClusterError(
                "cluster.gpus_per_worker",
                "must be said: no host with a GPU is here yet, and an autoscaler may bring some",
                hint="Use --set cluster.gpus_per_worker=1, or =0 to train on CPUs",
            )
    needs = {"CPU": float(cluster.cpus_per_worker)} | cluster.resources_per_worker
    return needs | ({"GPU": float(gpus)} if gpus else {})


def room_for(needs: Mapping[str, float], hosts: Sequence[Mapping[str, float]]) -> int:
    """How many workers fit on hosts.

    Args:
        needs: what each worker needs, by resource.
        hosts: what each host has to give.
    """
    requested = {name: amount for name, amount in needs.items() if amount > 0}
    return sum(
        int(min((has.get(name, 0.0) + 1e-6) // amount for name, amount in requested.items()))
        for has in hosts
    )


def too_small(config: Config, needs: Mapping[str, float], has: Mapping[str, float]) -> ClusterError:
    """The error of a cluster that has no room for the fewest workers of a run.

    Args:
        config: of the run.
        needs: what each worker needs, by resource.
        has: what the whole cluster has.
    """
    where = "the cluster" if config.cluster.address else "this machine"
    size = config.fitting_workers()[0]
    # What is least there; where all is there, it is in use, or on hosts that are too small.
    name = min(needs, key=lambda name: has.get(name, 0) / needs[name])
    room = int(has.get(name, 0) // needs[name])
    total = f"need {size * needs[name]:g} {name}s, and {where} has {has.get(name, 0):g}"
    return ClusterError(
        "--workers",
        total if room < size else f"{total}, but not so many on hosts where a worker fits",
        value=config.cluster.workers,
        hint=f"Use --workers {room}" if 0 < room < size else f"Add a host with a {name}",
    )


def largest(sizes: Sequence[int], room: int) -> int | None:
    """The largest of ``sizes`` for which there is room; None if there is none."""
    return max((size for size in sizes if size <= room), default=None)


def size_to_launch(
    sizes: Sequence[int], room: int, capacity: int, waited_s: float, patience_s: float
) -> int | None:
    """How many workers to launch now; None to wait.

    What a launch held that has just ended takes Ray a moment to give back: for so long, all that
    the hosts have is waited for.

    Args:
        sizes: that the run can have.
        room: for so many workers now.
        capacity: for so many if nobody else were there.
        waited_s: seconds so far.
        patience_s: seconds after which what there is will do.
    """
    now = largest(sizes, room)
    return now if now == largest(sizes, capacity) or waited_s >= patience_s else None


def is_worth_resizing(now: int, later: int, left_s: float, cost_s: float) -> bool:
    """Whether to go on with ``later`` workers instead of ``now``, by the time that it saves.

    Args:
        now: workers at work.
        later: workers there could be.
        left_s: seconds that the run would still take as it is.
        cost_s: seconds that a new start takes.
    """
    return later > now and left_s * (1 - now / later) > 2 * cost_s


def quiet_s(elapsed_s: float, disturbances: int) -> float:
    """Seconds for which workers are likely to be left alone: one start takes in all who have come.

    From how often they have been disturbed so far, by failures and notices, and from one
    disturbance an hour as long as little is known.

    Args:
        elapsed_s: since the first launch.
        disturbances: that ended a launch since then.
    """
    return (elapsed_s + _HOUR_S) / (disturbances + 1)


@dataclass
class Growth:
    """Decides when a run takes in hosts that have joined: not for one that comes and goes.

    Attributes:
        patience_s: for how long the room must have been there.
        since_s: when it was first seen; None while there is none.
    """

    patience_s: float
    since_s: float | None = None

    def decide(
        self, now: int, later: int | None, left_s: float, cost_s: float, at_s: float
    ) -> bool:
        """Whether to resize now; see :func:`is_worth_resizing`. ``at_s`` is the present time."""
        if later is None or not is_worth_resizing(now, later, left_s, cost_s):
            self.since_s = None
            return False
        if self.since_s is None:
            self.since_s = at_s
        return at_s - self.since_s >= self.patience_s
