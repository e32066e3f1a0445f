"""Whether a state is still one that a run could go on from: what users' code does may spoil it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.common.errors import PluginError, TrainingError
from gatdist.training.state import TrainState


class Intact:
    """What a state is like before training, to be compared with later.

    Args:
        state: with its update rule.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        tensors = state.tensors()
        self._kinds = _kinds(tensors)
        # Masks of a user's network may be infinite, and are so from the beginning.
        self._finite = [name for name, is_finite in _finite(tensors).items() if is_finite]

    @torch.no_grad()
    def require(self) -> None:
        """Refuse a state whose checkpoint would be of no use.

        Raises:
            PluginError: tensors were added, removed or replaced.
            TrainingError: a tensor is no longer finite.
        """
        for owner, player in self._state.players.items():
            now = {n: p for n, p in player.bare.named_parameters() if p.requires_grad}
            for key in sorted(now.keys() | player.parameters.keys()):
                if now.get(key) is not player.parameters.get(key):
                    self._refuse(f"model.{owner}: parameter {key}", "frozen or replaced by another")
        tensors = self._state.tensors()
        kinds = _kinds(tensors)
        for name in sorted(kinds.keys() | self._kinds.keys()):
            if kinds.get(name) != self._kinds.get(name):
                self._refuse(f"tensor {name}", "replaced by another shape or dtype")
        finite = _finite(tensors)
        for name in self._finite:
            if not finite[name]:
                raise TrainingError(
                    f"tensor {name} is no longer finite after {self._state.samples_seen:,} "
                    "samples. The last checkpoint is good"
                )

    def _refuse(self, subject: str, how: str) -> None:
        raise PluginError(
            subject,
            f"was added, removed, {how} during the run, so that no checkpoint could be read again",
            hint="Create parameters and buffers in the constructor, and then change values only",
        )


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _finite(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Whether each tensor is finite, by one transfer from the device."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
    return dict(zip(tensors, finite.tolist(), strict=True))
