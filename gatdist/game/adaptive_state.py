"""State that a game adapts to its own observations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor


class AdaptiveState(Protocol):
    """A few scalars that follow observations; identical on every rank and part of checkpoints.

    Attributes:
        tags: Observations whose means over the global batch it is updated with.
        tensors: Its state by name: scalars on the device, changed in place.
    """

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Update the state once per step, without waiting for the device.

        Args:
            means: Scalars, for those of :attr:`tags` that the step observed. May be NaN.
            step: Index of the step.
            num_samples: Size of the global batch.
        """


class Averages(Mapping[str, Tensor]):
    """Running means of observations by tag: ā ← decay · ā + (1 − decay) · mean, from 0.

    ``decays`` are in [0, 1), by tag.
    """

    def __init__(
        self,
        decays: Mapping[str, float],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._decays = dict(decays)
        self.tags = tuple(sorted(decays))
        self.tensors = {tag: torch.zeros((), device=device, dtype=dtype) for tag in self.tags}

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Update the averages of the observations that are present and finite."""
        for tag, mean in means.items():
            average = self.tensors[tag]
            updated = average.lerp(mean.to(average.dtype), 1 - self._decays[tag])
            average.copy_(updated.where(updated.isfinite(), average))

    def __getitem__(self, tag: str) -> Tensor:
        return self.tensors[tag]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
