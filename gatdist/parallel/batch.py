"""One worker's share of a global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One worker's share of the global batch, or a part of it.

    Attributes:
        real: n samples in network representation; of several fields, the one that is generated.
        labels: int64 [n], or None for unlabelled data.
        positions: int64 [n], each sample's position in the run: the key of every random draw.
        step: index of the step, a function of ``samples_seen``.
        total: samples of all workers together.
        noise: number of the noise stream, raised by each rollback.
        host_positions: ``positions`` on the CPU, where they are on another device themselves.
        scheduled: values of the losses' schedules, by name, where they are kept on the device;
            others are a function of ``step``.
        weight: factor of the mean loss over these samples in the mean over the global batch, times
            the loss scale under float16.
        part: index of this part within the worker's share.
        inputs: the samples' other fields, [n, …] each.
    """

    real: Tensor
    labels: Tensor | None
    positions: Tensor
    step: int
    total: int
    noise: int = 0
    weight: float | Tensor = 1.0
    scheduled: Mapping[str, Tensor] = field(default_factory=dict)
    host_positions: Tensor | None = None
    part: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Position of the first sample; the host does not wait for a device."""
        return int(self._known_positions[0])

    @property
    def _known_positions(self) -> Tensor:
        return self.positions if self.host_positions is None else self.host_positions

    def __len__(self) -> int:
        return len(self.positions)

    def every(self, stride: int, start: int) -> Self:
        """Return part ``start`` of ``stride`` interleaved parts."""
        return replace(self._at(slice(start, None, stride)), part=start)

    def consecutive(self, count: int) -> list[Self]:
        """Return this worker's shares of ``count`` batches of equal size, in order.

        These samples are such shares, one after another.
        """
        if count == 1:
            return [self]
        size, total = len(self) // count, self.total // count
        return [
            replace(self._at(slice(i * size, (i + 1) * size)), total=total) for i in range(count)
        ]

    def last(self, size: int) -> Self:
        """Return this worker's share of the last ``size`` samples of all workers.

        The first of all has a position that is a multiple of ``total``.
        """
        if size == self.total:
            return self
        count = size
        if len(self) < self.total:
            # By NumPy: a recording of device operations must not contain it.
            places = self._known_positions.cpu().numpy() % self.total
            count = int((places >= self.total - size).sum())
        return replace(self._at(slice(len(self) - count, None)), total=size)

    def _at(self, where: slice) -> Self:
        return replace(
            self,
            real=self.real[where],
            labels=None if self.labels is None else self.labels[where],
            positions=self.positions[where],
            host_positions=None if self.host_positions is None else self.host_positions[where],
            inputs={name: tensor[where] for name, tensor in self.inputs.items()},
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return what ``values`` [n], one per sample, add to the mean over the global batch."""
        mean = values.mean()
        whole = isinstance(self.weight, float) and self.weight == 1.0
        return mean if whole else mean * self.weight

    def scaled(self, factor: float | Tensor) -> Self:
        """Return the same samples, their weight multiplied."""
        return replace(self, weight=self.weight * factor)
