"""What the game learns from its own observations, alike on all workers.

A learner sees means over the global batch, once a step, and keeps a few scalars on the device,
which go into checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor


class AdaptiveState(Protocol):
    """Something adaptive in a game.

    Attributes:
        tags: the observations whose means it wants.
        tensors: all that it remembers, by name: scalars on the device, changed in place.
    """

    @property
    def tags(self) -> tuple[str, ...]:
        """See the class."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """See the class."""

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Take note of a step's means over the global batch, without waiting for the device.

        Args:
            means: scalars, by those of :attr:`tags` that the step observed. May be NaN.
            step: its index.
            num_samples: in the global batch.
        """


class Averages(Mapping[str, Tensor]):
    """Running means of observations: ā ← decay · ā + (1 − decay) · mean, from 0.

    Args:
        decays: by tag, in [0, 1).
        device: where they are kept.
        dtype: what they are kept in.
    """

    def __init__(
        self,
        decays: Mapping[str, float],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._decays = dict(decays)
        self.tensors = {
            tag: torch.zeros((), device=device, dtype=dtype) for tag in sorted(self._decays)
        }

    @property
    def tags(self) -> tuple[str, ...]:
        """The averaged observations."""
        return tuple(self.tensors)

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Move every average whose observation is there and finite."""
        for tag, mean in means.items():
            average = self.tensors[tag]
            moved = average.lerp(mean.to(average.dtype), 1 - self._decays[tag])
            average.copy_(moved.where(moved.isfinite(), average))

    def __getitem__(self, tag: str) -> Tensor:
        return self.tensors[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
