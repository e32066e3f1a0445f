"""Judges gradients on the device, alike on all workers: what they look at is reduced already."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.config import HealthConfig, PlayerName

# A norm is compared with the mean of at least so many others.
_WARM_UP_STEPS = 100
_DECAY = 0.99


class Guard:
    """Says of each phase whether its players may move, and counts those that may not.

    Args:
        config: what counts as a spike.
        players: names of all players.
        device: where gradients are.

    Attributes:
        tensors: ``nonfinite`` and ``spikes``, int64 counts of phases that did not move anybody;
            ``norm/PLAYER``, running means of gradient norms, and ``scores/PLAYER``, of how many.
    """

    def __init__(
        self, config: HealthConfig, players: tuple[str, ...], device: torch.device
    ) -> None:
        self._factor = config.spike_factor if config.spike != "off" else None
        self.tensors = {
            name: torch.zeros((), dtype=torch.int64, device=device)
            for name in ("nonfinite", "spikes")
        }
        if self._factor is not None:
            for name in players:
                self.tensors[f"norm/{name}"] = torch.zeros((), dtype=torch.float64, device=device)
                self.tensors[f"count/{name}"] = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, norms: Mapping[PlayerName, Tensor], excused: Tensor | None = None) -> Tensor:
        """1.0 if all ``norms`` (by player) are finite and none is a spike, else 0.0.

        Args:
            norms: of the reduced gradients of players who move together.
            excused: where true, non-finite norms are not counted.
        """
        finite = all_finite(norms)
        counted = ~finite if excused is None else ~finite & ~excused
        self.tensors["nonfinite"] += counted
        if self._factor is None:
            return finite.float()
        calm = torch.stack([self._calm(name, norm) for name, norm in norms.items()]).all()
        self.tensors["spikes"] += finite & ~calm
        ok = finite & calm
        for name, norm in norms.items():
            mean, scores = self.tensors[f"norm/{name}"], self.tensors[f"count/{name}"]
            scores += ok
            # The mean of the first few, then an exponential one.
            share = (1.0 / scores.clamp_min(1)).clamp_min(1 - _DECAY)
            mean.copy_(mean.lerp(norm.to(mean.dtype), share).where(ok, mean))
        return ok.float()

    def _calm(self, name: str, norm: Tensor) -> Tensor:
        mean, scores = self.tensors[f"norm/{name}"], self.tensors[f"count/{name}"]
        assert self._factor is not None
        return (scores < _WARM_UP_STEPS) | (norm <= self._factor * mean)


def all_finite(norms: Mapping[PlayerName, Tensor]) -> Tensor:
    """Whether every norm (≥ 0) is finite, a boolean scalar."""
    first, *others = norms.values()
    return sum(others, first) < math.inf


class LossScaler:
    """Keeps float16's gradients in range: doubles the scale after so many good steps, else halves.

    (Micikevicius et al. 2018.) It is moved by what all workers know, so they share it.

    Attributes:
        tensors: ``scale``, and ``good_steps`` since it last changed.
    """

    INITIAL, GROWTH_STEPS = 2.0**16, 2000

    def __init__(self, device: torch.device) -> None:
        self.tensors = {
            "scale": torch.full((), self.INITIAL, device=device),
            "good_steps": torch.zeros((), dtype=torch.int64, device=device),
        }

    @property
    def scale(self) -> Tensor:
        """What losses are multiplied by: a scalar ≥ 1."""
        return self.tensors["scale"]

    @property
    def may_overflow(self) -> Tensor:
        """True while a smaller scale could make a non-finite gradient finite."""
        return self.scale > 1

    def update(self, finite: Tensor) -> None:
        """Take note of a phase. ``finite``: a scalar, true or false."""
        good = self.tensors["good_steps"]
        good.copy_((good + 1).where(finite, 0))
        grows = good >= self.GROWTH_STEPS
        scale = self.scale.where(finite, (self.scale / 2).clamp_min(1))
        self.scale.copy_(torch.where(grows, scale * 2, scale))
        good.copy_(good.where(~grows, 0))
