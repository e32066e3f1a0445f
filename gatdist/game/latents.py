"""The latents of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatdist.config import LatentDistribution
from gatdist.models.layers import latents_from
from gatdist.parallel import draws

# Limits of what is drawn ahead.
_MAX_NUMBERS, _MAX_STEPS = 2**17, 32


class Latents:
    """Random numbers, a function of (seed, stream, position).

    On the CPU, latents of several steps are drawn at once, because a call costs more than the
    numbers of a small batch.

    Args:
        seed: Seed of the run.
        size: Numbers per latent.
        step_samples: Difference between the positions of consecutive steps; 0 if unknown.
        distribution: Of each number.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        step_samples: int = 0,
        distribution: LatentDistribution = "normal",
    ) -> None:
        self.seed, self.size, self._stride = seed, size, step_samples
        self.distribution = distribution
        # By kind of batch: positions [n] of the first step, and latents [steps, n, size].
        self._ahead: dict[tuple[str, torch.dtype, int, int], tuple[Tensor, Tensor]] = {}
        # The last request and its result: the phases of both players request the same latents.
        self._request: tuple[Tensor | None, Any] = (None, None)
        self._result = torch.empty(0)

    def __call__(self, positions: Tensor, stream: str, dtype: torch.dtype) -> Tensor:
        """Return [n, size] for int64 positions [n]. Do not change it in place."""
        what = (positions._version, stream, dtype)  # the version detects changes in place
        if positions is not self._request[0] or what != self._request[1]:
            self._result = self._at(positions, stream, dtype)
            self._request = (positions, what)
        return self._result

    def _at(self, positions: Tensor, stream: str, dtype: torch.dtype) -> Tensor:
        n = len(positions)
        steps = min(_MAX_STEPS, _MAX_NUMBERS // max(1, n * self.size))
        if not draws.is_readable(positions) or not self._stride or steps < 2:
            return self._draw(positions, stream, dtype)
        first = int(positions[0])
        kind = (stream, dtype, n, first % self._stride)
        if kind in self._ahead:
            start, drawn = self._ahead[kind]
            step = (first - int(start[0])) // self._stride
            if 0 <= step < len(drawn) and torch.equal(start + self._stride * step, positions):
                return drawn[step]
        later = positions + self._stride * torch.arange(steps)[:, None]
        drawn = self._draw(later.flatten(), stream, dtype).view(steps, n, self.size)
        self._ahead[kind] = (positions.clone(), drawn)
        return drawn[0]

    def _draw(self, positions: Tensor, stream: str, dtype: torch.dtype) -> Tensor:
        normal = draws.normal(self.seed, stream, positions, (self.size,), dtype)
        return latents_from(normal, self.distribution)
