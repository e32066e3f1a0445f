"""The latents of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatdist.parallel import devices, draws

# At most so many numbers are drawn at once, for at most so many steps.
_MOST_NUMBERS, _MOST_STEPS = 2**17, 32


class Latents:
    """Standard normal numbers, a function of (seed, stream, position).

    On the CPU they are drawn for some steps ahead, since a call costs more than the numbers of a
    small batch. That changes nothing but the time.

    Args:
        seed: of the run.
        size: numbers in one latent.
        step_samples: by how much the positions of one step differ from those of the one before; 0
            if that is not known.
    """

    def __init__(self, seed: int, size: int, step_samples: int = 0) -> None:
        self.seed, self.size, self._stride = seed, size, step_samples
        # By kind of batch: positions [n] of the first step, and latents [steps, n, size].
        self._ahead: dict[tuple[str, torch.dtype, int, int], tuple[Tensor, Tensor]] = {}
        # The last question and answer: both players' phases ask for the same.
        self._asked: tuple[Tensor | None, Any] = (None, None)
        self._answer = torch.empty(0)

    def __call__(self, positions: Tensor, stream: str, dtype: torch.dtype) -> Tensor:
        """[n, size], for int64 positions [n]; not to be changed in place."""
        what = (positions._version, stream, dtype)  # which tells of changes in place
        if positions is not self._asked[0] or what != self._asked[1]:
            self._answer = self._at(positions, stream, dtype)
            self._asked = (positions, what)
        return self._answer

    def _at(self, positions: Tensor, stream: str, dtype: torch.dtype) -> Tensor:
        n = len(positions)
        steps = min(_MOST_STEPS, _MOST_NUMBERS // max(1, n * self.size))
        if not devices.is_readable(positions) or not self._stride or steps < 2:
            return draws.normal(self.seed, stream, positions, (self.size,), dtype)
        first = int(positions[0])
        kind = (stream, dtype, n, first % self._stride)
        if kind in self._ahead:
            start, drawn = self._ahead[kind]
            step = (first - int(start[0])) // self._stride
            if 0 <= step < len(drawn) and torch.equal(start + self._stride * step, positions):
                return drawn[step]
        later = positions + self._stride * torch.arange(steps)[:, None]
        drawn = draws.normal(self.seed, stream, later.flatten(), (self.size,), dtype)
        drawn = drawn.view(steps, n, self.size)
        self._ahead[kind] = (positions.clone(), drawn)
        return drawn[0]
