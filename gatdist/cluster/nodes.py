"""Hosts of a Ray cluster as Ray sees them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import state  # no public API covers single hosts without the dashboard

from gatdist.cluster.policies import room_for

# For how long a host may take to accept a connection, and how many are asked at a time.
_ANSWER_S = 1.0
_MOST_ASKED = 64
_SET_BY_KUBERAY = "RAY_enable_autoscaler_v2"


@dataclass(frozen=True)
class Nodes:
    """A snapshot of the hosts, by Ray's node ids."""

    alive: frozenset[str]
    draining: Mapping[str, float]  # seconds until it is taken away; infinity if unknown
    free: Mapping[str, Mapping[str, float]]  # unused resources of each host that does not drain
    total: Mapping[str, Mapping[str, float]]  # its resources, used or not
    addresses: Mapping[str, tuple[str, int]]  # of Ray on each host

    @classmethod
    def now(cls) -> Nodes:
        """Take a snapshot."""
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        draining = {
            node: deadline_ms / 1e3 - time.time() if deadline_ms else float("inf")
            for node, deadline_ms in state.state.get_draining_nodes().items()
            if node in nodes
        }
        available = state.available_resources_per_node()  # type: ignore[no-untyped-call]
        staying = [node for node in nodes if node not in draining]
        free = {node: available.get(node, {}) for node in staying}
        total = {node: nodes[node]["Resources"] for node in staying}
        addresses = {
            identity: (node["NodeManagerAddress"], node["NodeManagerPort"])
            for identity, node in nodes.items()
        }
        return cls(frozenset(nodes), draining, free, total, addresses)

    def room(self, needs: Mapping[str, float]) -> int:
        """Return how many workers fit now."""
        return room_for(needs, list(self.free.values()))

    def capacity(self, needs: Mapping[str, float]) -> int:
        """Return how many workers would fit on otherwise idle hosts."""
        return room_for(needs, list(self.total.values()))

    def lost(self, used: Collection[str]) -> list[str]:
        """Return those of ``used`` that are dead."""
        return sorted(set(used) - self.alive)

    def leaving(self, used: Collection[str]) -> float | None:
        """Return the seconds until the first of ``used`` is taken away; None if none drains."""
        return min((s for node, s in self.draining.items() if node in used), default=None)


def dead_actors(actors: Collection[str]) -> set[str]:
    """Return those of ``actors`` that Ray reports as dead."""
    return {actor for actor in actors if state.actors(actor).get("State") == "DEAD"}


def silent_hosts(addresses: Mapping[str, tuple[str, int]]) -> set[str]:
    """Return those of the nodes that do not answer at their addresses.

    Ray itself takes several seconds to find out.
    """

    def is_silent(node: str) -> bool:
        try:
            socket.create_connection(addresses[node], timeout=_ANSWER_S).close()
        except OSError:
            return True
        return False

    if not addresses:
        return set()
    with ThreadPoolExecutor(_MOST_ASKED) as pool:
        return {
            n for n, silent in zip(addresses, pool.map(is_silent, addresses), strict=True) if silent
        }


def may_grow() -> bool:
    """Whether an autoscaler may add hosts.

    Ray does not say. It is derived from what is found on the head, where the driver of a job runs:
    a variable that KubeRay sets, the file of ``ray up``, or the configuration in Ray's tables.
    """
    return (
        os.environ.get(_SET_BY_KUBERAY) in ("1", "true")
        or Path("~/ray_bootstrap_config.yaml").expanduser().exists()
        or bool(state.state.get_max_resources_from_cluster_config())
    )
