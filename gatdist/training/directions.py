"""What an optimizer follows: the gradient, or something made of it and of the steps before.

A direction may change the gradient before the optimizer sees it, and the step that the optimizer
took after it. Nothing waits for the device: where ``ok`` (a scalar) is 0, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]


class Direction:
    """The gradient itself.

    Attributes:
        tensors: what it remembers, by name, changed in place: one list, a tensor a parameter, or
            one scalar in a list of its own.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensors] = {}

    def before(self, gradients: Sequence[Tensor], ok: Tensor) -> None:
        """Change the gradients in place."""

    def after(self, parameters: Sequence[Tensor], start: Sequence[Tensor], ok: Tensor) -> None:
        """Change the parameters in place, which the optimizer has moved from ``start``."""

    @property
    def needs_start(self) -> bool:
        """Whether :meth:`after` looks at ``start``."""
        return False


class Optimistic(Direction):
    """w ← w + 2Δ − Δ₋₁, where Δ is the optimizer's step and Δ₋₁ the one before; first w + Δ.

    With plain descent Δ = −η F(w), so that w ← w − 2η F(w) + η F(w₋₁); with Adam it is Optimistic
    Adam (Daskalakis et al. 2018). Keeps two copies of the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = {
            "previous": [torch.zeros_like(p) for p in parameters],
            "started": [parameters[0].detach().new_zeros(())],
        }

    @property
    def needs_start(self) -> bool:
        """True."""
        return True

    def after(self, parameters: Sequence[Tensor], start: Sequence[Tensor], ok: Tensor) -> None:
        """Add Δ − Δ₋₁, and remember Δ."""
        previous, (started,) = self.tensors["previous"], self.tensors["started"]
        step = torch._foreach_sub(list(parameters), list(start))
        extra = torch._foreach_sub(step, previous)
        torch._foreach_mul_(extra, started * ok)
        torch._foreach_add_(list(parameters), extra)
        for old, new in zip(previous, step, strict=True):
            old.copy_(new.where(ok > 0, old))
        started.copy_(torch.maximum(started, ok))


class Conjugate(Direction):
    """d ← −g + β d₋₁ instead of −g, dot products over the whole network (Naganuma & Iiduka 2023).

    β with y = g − g₋₁: ``FR`` ⟨g, g⟩/⟨g₋₁, g₋₁⟩, ``PR`` ⟨g, y⟩/⟨g₋₁, g₋₁⟩, ``HS`` ⟨g, y⟩/⟨d₋₁, y⟩,
    ``DY`` ⟨g, g⟩/⟨d₋₁, y⟩, ``HZ`` ⟨y − 2 d₋₁ ⟨y, y⟩/⟨d₋₁, y⟩, g⟩/⟨d₋₁, y⟩; ``FR-PR`` and
    ``HS-DY`` are max(0, min(·, ·)). Restarts with −g where d would not descend, or β is not finite.
    Keeps two copies of the gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], beta: str) -> None:
        super().__init__()
        self.beta = beta
        self.tensors = {
            "gradient": [torch.zeros_like(p) for p in parameters],
            "direction": [torch.zeros_like(p) for p in parameters],
            "started": [parameters[0].detach().new_zeros(())],
        }

    def before(self, gradients: Sequence[Tensor], ok: Tensor) -> None:
        """Put −d in the gradient's place."""
        g, before = list(gradients), self.tensors["gradient"]
        d, (started,) = self.tensors["direction"], self.tensors["started"]
        beta = self._beta(g, before, d)
        # A restart is needed where ⟨−g + β d₋₁, g⟩ ≥ 0.
        usable = beta.isfinite() & (beta * _dot(d, g) < _dot(g, g)) & (started > 0)
        beta = beta.where(usable, 0.0)
        new = [torch.where(usable, beta * old, 0.0) - now for old, now in zip(d, g, strict=True)]
        for store, values in ((before, g), (d, new)):
            for old, value in zip(store, values, strict=True):
                old.copy_(value.where(ok > 0, old))
        started.copy_(torch.maximum(started, ok))
        for gradient, value in zip(g, new, strict=True):
            gradient.copy_(-value)

    def _beta(self, g: Tensors, before: Tensors, d: Tensors) -> Tensor:
        y = torch._foreach_sub(g, before)
        squared_before, g_y, g_g = _dot(before, before), _dot(g, y), _dot(g, g)
        d_y = _dot(d, y)
        fr, pr = g_g / squared_before, g_y / squared_before
        hs, dy = g_y / d_y, g_g / d_y
        hz = (g_y - 2 * _dot(d, g) * _dot(y, y) / d_y) / d_y
        return {
            "FR": fr,
            "PR": pr,
            "HS": hs,
            "DY": dy,
            "HZ": hz,
            "FR-PR": torch.minimum(fr, pr).clamp_min(0),
            "HS-DY": torch.minimum(hs, dy).clamp_min(0),
        }[self.beta]


def build_direction(name: str, parameters: Sequence[Tensor], beta: str) -> Direction:
    """The direction ``gradient``, ``optimistic`` or ``conjugate`` for these parameters."""
    if name == "optimistic":
        return Optimistic(parameters)
    return Conjugate(parameters, beta) if name == "conjugate" else Direction()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
