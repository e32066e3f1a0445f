"""Means over a log interval, summed on the device and reduced once at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.parallel.communicator import Communicator

_MOST_WAITING = 64


class Statistics:
    """Count and sum of named values, in float64 on ``device``.

    Every worker must add the same names between two reductions (but see :meth:`reduce`), and any
    number of values.
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
        sums = torch.stack([finite.double(), x]).sum(dim=1)  # [2]
        if name in self._sums:
            self._sums[name] += sums
        else:
            self._sums[name] = sums

    def clear(self) -> None:
        self._sums.clear()
        self._waiting.clear()

    def reduce(self, comm: Communicator, *, same_names: bool = True) -> dict[str, float]:
        """Reduce all names over all workers in one collective, and reset.

        Without ``same_names``, workers may have added different ones. If the collective fails,
        nothing is reset.

        Returns means by name, sorted; names without a value are absent.
        """
        for name in list(self._waiting):
            self._add_up(name)
        names = sorted(self._sums)
        if not same_names:
            names = sorted({name for each in comm.all_gather_object(names) for name in each})
        if not names:
            return {}
        none = torch.zeros(2, dtype=torch.float64, device=self._device)
        sums = torch.stack([self._sums.get(name, none) for name in names])  # [names, 2]
        rows = zip(names, comm.all_reduce_(sums).tolist(), strict=True)
        self._sums.clear()
        return {name: total / count for name, (count, total) in rows if count}
