"""Which sample goes where: a function of the samples' names alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

from gatdist.packing.entries import Entry


@dataclass(frozen=True)
class Task:
    """One shard to be.

    Attributes:
        number: of the shard.
        first: number of its first sample in the whole plan.
        entries: its samples, in their order.
    """

    number: int
    first: int
    entries: Sequence[Entry]

    def to_json(self) -> str:
        """As JSON, for another process."""
        return json.dumps([self.number, self.first, self.entries])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote."""
        number, first, entries = json.loads(text)
        return cls(number, first, [Entry.from_json(entry) for entry in entries])


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """All samples, ordered by a hash of their names.

    So classes are mixed in every shard, and it does not matter in which order the storage lists.
    """
    return sorted(entries, key=lambda entry: (_hash(entry.name), entry.name))


def cut(entries: Sequence[Entry], sizes: Sequence[float], shard_bytes: int) -> list[Task]:
    """Cut samples into shards of about equal size, the largest at most ``shard_bytes`` or so.

    Args:
        entries: at least one, in order.
        sizes: of each in a shard, in bytes, as far as that can be told.
        shard_bytes: > 0.
    """
    total = sum(sizes)
    count = min(len(entries), max(1, math.ceil(total / shard_bytes)))
    ends: list[int] = []  # number of the sample behind each shard's last
    for number, size in enumerate(accumulate(sizes), 1):
        if size >= total * (len(ends) + 1) / count and len(ends) < count - 1:
            ends.append(number)
    bounds = sorted({0, *ends, len(entries)})
    return [
        Task(number, first, entries[first:end])
        for number, (first, end) in enumerate(pairwise(bounds))
    ]


def fingerprint(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) over what a plan does with which samples."""
    digest = hashlib.sha256()
    for task in tasks:
        facts: list[Any] = [[entry.name, entry.size, entry.label] for entry in task.entries]
        digest.update(json.dumps([task.number, task.first, facts]).encode())
    return digest.hexdigest()


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
