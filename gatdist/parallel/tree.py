"""The tree along which the canonical reduction sums virtual workers, and its division.

The leaves of the complete binary tree are the L virtual workers (a power of two) in bit-reversed
order, so that v and v + L/2 are neighbours. Each worker holds neighbouring leaves.
"""

from __future__ import annotations


def bit_reversed(count: int) -> list[int]:
    """Return 0 to n − 1 (a power of two) in bit-reversed order: 0, n/2, n/4, 3n/4 and so on."""
    order = [0]
    while len(order) < count:
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    return order


def leaves_of(rank: int, world_size: int, count: int) -> range:
    """Return the places in the tree's order of one worker's leaves: ⌈rn/W⌉ to ⌈(r + 1)n/W⌉ − 1.

    Worker 0 has as many as any other.
    """
    return range(-(-rank * count // world_size), -(-(rank + 1) * count // world_size))


def subtrees(leaves: range) -> list[range]:
    """Cut neighbouring leaves into the fewest complete subtrees."""
    found = []
    first = leaves.start
    while first < leaves.stop:
        count = 1
        while first % (2 * count) == 0 and first + 2 * count <= leaves.stop:
            count *= 2
        found.append(range(first, first + count))
        first += count
    return found
