"""What Ray knows of the hosts: which are alive, which are about to go, what they have to give."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import ray
from ray._private import state  # no public name tells of single hosts without the dashboard

from gatdist.cluster.sizing import room_for


@dataclass(frozen=True)
class Nodes:
    """The hosts at one moment, by the ids that Ray gives them.

    Attributes:
        alive: those that can be reached.
        draining: seconds until each of those that were given notice is taken away; infinity where
            nobody has said when.
        free: what each of the others has to give that nobody uses, by resource.
        total: what each of the others has, used or not.
    """

    alive: frozenset[str]
    draining: Mapping[str, float]
    free: Mapping[str, Mapping[str, float]]
    total: Mapping[str, Mapping[str, float]]

    @classmethod
    def now(cls) -> Nodes:
        """As Ray sees them."""
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
        return cls(frozenset(nodes), draining, free, total)

    @staticmethod
    def dead_actors(actors: Collection[str]) -> set[str]:
        """Those of ``actors`` that Ray knows to be dead."""
        return {actor for actor in actors if state.actors(actor).get("State") == "DEAD"}

    def room(self, needs: Mapping[str, float]) -> int:
        """For how many more workers there is room."""
        return room_for(needs, list(self.free.values()))

    def capacity(self, needs: Mapping[str, float]) -> int:
        """For how many workers there would be room if nobody else were there."""
        return room_for(needs, list(self.total.values()))

    def lost(self, used: Collection[str]) -> list[str]:
        """Those of ``used`` that are dead."""
        return sorted(set(used) - self.alive)

    def leaving(self, used: Collection[str]) -> float | None:
        """Seconds until the first of ``used`` is taken away; None if none is about to go."""
        return min((s for node, s in self.draining.items() if node in used), default=None)
