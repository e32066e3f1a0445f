"""Exponential moving average of the generator's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """θ̄ ← β θ̄ + (1 − β) θ with β = ½^(batch / half-life), both in samples (Karras et al. 2018).

    Args:
        network: the generator; its present weights start the average.
        half_life_samples: samples after which a weight's share has halved (> 0).
    """

    def __init__(self, network: nn.Module, half_life_samples: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life_samples = half_life_samples
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def start(self, network: nn.Module) -> None:
        """Start again from ``network``'s weights."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module, num_samples: int) -> None:
        """Move towards ``network``'s weights after ``num_samples``; buffers are copied."""
        weight = 1 - 0.5 ** (num_samples / self.half_life_samples)
        if not self._pairs:  # gathered once: going through the modules takes as long as the sum
            self._pairs = [
                (list(self.network.parameters()), list(network.parameters())),
                (list(self.network.buffers()), list(network.buffers())),
            ]
        (mine, theirs), (buffers, new) = self._pairs
        torch._foreach_lerp_(mine, theirs, weight)
        if buffers:
            torch._foreach_copy_(buffers, new)
