"""What a run was at the start of the step in progress, to undo the step if a worker is lost."""

from __future__ import annotations

import torch

from gatdist.training.state import TrainState


class StepStart:
    """A copy of the training state on its device, renewed at the start of each step.

    A lost worker leaves a step half made, perhaps after the discriminator's update.

    Attributes:
        is_open: whether a step has begun and not ended.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.is_open = False
        self._tensors: list[torch.Tensor] = []  # gathered once: that takes as long as a copy
        self._copies: list[torch.Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the state."""
        if not self._copies:
            self._tensors = list(self._state.tensors().values())
            self._copies = [torch.empty_like(tensor) for tensor in self._tensors]
        torch._foreach_copy_(self._copies, self._tensors)
        self.is_open = True

    def end(self) -> None:
        """Keep what the step has made."""
        self.is_open = False

    @torch.no_grad()
    def undo(self) -> bool:
        """Return to the start of the step, unless it has ended; return whether it had not."""
        undoes = self.is_open
        if undoes:
            torch._foreach_copy_(self._tensors, self._copies)
            self._state.loaded()
        self.is_open = False
        return undoes
