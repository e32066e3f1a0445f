"""Means over a log interval, summed on the device and reduced once at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SupportsAllReduce(Protocol):
    """The part of a communicator that a reduction needs."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all workers, in place."""


_MOST_WAITING = 64


@dataclass(frozen=True)
class Moments:
    """Moments of one name's values on all workers since the last reduction."""

    count: float
    mean: float
    deviation: float


class Statistics:
    """Count, sum and sum of squares of named values, in float64 on ``device``.

    Every worker must add the same names between two reductions, but any number of values.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the finite entries of ``values``, of any shape and real dtype, without waiting.

        They are read later, for many calls at once, and must not be changed before.
        """
        waiting = self._waiting.setdefault(name, [])
        waiting.append(values.detach())
        if len(waiting) == _MOST_WAITING:
            self._add_up(name)

    def _add_up(self, name: str) -> None:
        values = [value.flatten() for value in self._waiting.pop(name)]
        x = torch.cat(values).to(self._device, torch.float64, non_blocking=True)
        # Without values that are not finite: one skipped step must not hide the others.
        finite = x.isfinite()
        x = x.where(finite, 0.0)
        sums = torch.stack([finite.double(), x, x.square()]).sum(dim=1)  # [3]
        if name in self._sums:
            self._sums[name] += sums
        else:
            self._sums[name] = sums

    def clear(self) -> None:
        self._sums.clear()
        self._waiting.clear()

    def moments(self, comm: SupportsAllReduce) -> dict[str, Moments]:
        """Reduce all names over all workers in one collective, and reset.

        Returns moments by name, sorted; names without a value are absent.
        """
        for name in list(self._waiting):
            self._add_up(name)
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])  # [names, 3]
        self._sums.clear()
        rows = zip(names, comm.all_reduce_(sums).tolist(), strict=True)
        return {name: _moments(*row) for name, row in rows if row[0]}

    def reduce(self, comm: SupportsAllReduce) -> dict[str, float]:
        """Return the means of :meth:`moments`."""
        return {name: moments.mean for name, moments in self.moments(comm).items()}


def _moments(count: float, total: float, squares: float) -> Moments:
    mean = total / count
    variance = squares / count - mean**2
    # Rounding can leave a constant's variance just below zero.
    return Moments(count, mean, math.sqrt(max(variance, 0.0)))
