"""How long an all-reduce takes: the α–β model of rings, trees and hierarchies.

n bytes, p workers; a message of m bytes takes α + m / β over a link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Algorithm = Literal["fastest", "ring", "tree", "hierarchical"]
# One number, or one for each of many variants that are computed at once.
Values = float | NDArray[np.float64]


class Link(NamedTuple):
    """α in seconds, β in bytes per second."""

    latency_s: float
    bandwidth_bytes_per_s: float


def ring_s(num_bytes: float, workers: int, link: Link) -> float:
    """Seconds of a ring: 2 (p − 1) α + 2 (p − 1) / p · n / β.

    Reduce-scatter, then all-gather, p − 1 steps of n / p bytes each (Patarasuk and Yuan, 2009).
    """
    steps = 2 * (workers - 1)
    return steps * link.latency_s + steps / workers * num_bytes / link.bandwidth_bytes_per_s


def tree_s(num_bytes: float, workers: int, link: Link) -> float:
    """Seconds of a tree: 2 log₂(p) α + 2 n / β, up and down, in chunks (Sanders et al., 2009)."""
    if workers == 1:
        return 0.0
    depth = math.ceil(math.log2(workers))
    return 2 * depth * link.latency_s + 2 * num_bytes / link.bandwidth_bytes_per_s


def hierarchical_s(
    num_bytes: float, hosts: int, per_host: int, inside: Link, between: Link
) -> float:
    """Seconds of a reduce-scatter in each of h hosts of g workers, g rings, an all-gather.

    The first and the last are a ring over g; between them, g rings over h hosts of n / g bytes
    each share the host's network, which is a ring of n bytes with (h − 1) instead of (p − 1) steps.
    """
    return ring_s(num_bytes, per_host, inside) + ring_s(num_bytes, hosts, between)


@dataclass(frozen=True)
class Topology:
    """Hosts of equal size.

    Attributes:
        workers_per_host: g; the last host may have fewer.
        inside: between the workers of a host.
        between: of a host's network, which its workers share.
        algorithm: ``fastest`` is the fastest of the others.
    """

    workers_per_host: int
    inside: Link
    between: Link
    algorithm: Algorithm = "fastest"

    def all_reduce_s(self, num_bytes: float, workers: int) -> float:
        """Seconds of an all-reduce of ``num_bytes``; 0 where there is nobody to talk to."""
        if workers == 1 or not num_bytes:
            return 0.0
        hosts = math.ceil(workers / self.workers_per_host)
        # A flat ring or tree is as slow as its slowest link.
        link = self.inside if hosts == 1 else self.between
        per_host = min(workers, self.workers_per_host)
        options = {
            "ring": ring_s(num_bytes, workers, link),
            "tree": tree_s(num_bytes, workers, link),
            "hierarchical": hierarchical_s(num_bytes, hosts, per_host, self.inside, self.between),
        }
        return min(options.values()) if self.algorithm == "fastest" else options[self.algorithm]
