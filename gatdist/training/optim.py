"""Optimizers and step directions, with their state in plain lists of tensors.

Nothing here waits for the device: where the flag ``ok`` is 0 (``found_inf`` is 1), nothing changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from gatdist.config import PlayerOptimConfig
from gatdist.game import Hyperparameters

Tensors = list[Tensor]


class Optimizer(ABC):
    """Calls the functional form of a torch optimizer, which reads on the device whether to skip.

    Attributes:
        state: by name, one tensor per parameter, allocated at once and changed in place.
    """

    def __init__(self, parameters: Sequence[Tensor], config: PlayerOptimConfig) -> None:
        self._parameters, self._config = list(parameters), config
        self.state: dict[str, Tensors] = {}

    @abstractmethod
    def step(self, gradients: Tensors, settings: Hyperparameters, found_inf: Tensor) -> None:
        """Update the parameters.

        Args:
            gradients: laid out in memory as the parameters are.
            settings: of this step.
            found_inf: float32 scalar; 1 skips the step.
        """


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); with ``weight_decay``, AdamW (Loshchilov & Hutter 2019)."""

    def __init__(self, parameters: Sequence[Tensor], config: PlayerOptimConfig) -> None:
        super().__init__(parameters, config)
        self.state = {
            "step": [torch.zeros((), dtype=torch.float32, device=p.device) for p in parameters],
            "exp_avg": [torch.zeros_like(p) for p in parameters],
            "exp_avg_sq": [torch.zeros_like(p) for p in parameters],
        }

    def step(self, gradients: Tensors, settings: Hyperparameters, found_inf: Tensor) -> None:
        adam(
            self._parameters,
            gradients,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            [],
            self.state["step"],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.learning_rate,
            weight_decay=self._config.weight_decay,
            eps=self._config.eps,
            maximize=False,
            decoupled_weight_decay=bool(self._config.weight_decay),
        )


class SGD(Optimizer):
    """Gradient descent, optionally with momentum (Sutskever et al. 2013)."""

    def __init__(self, parameters: Sequence[Tensor], config: PlayerOptimConfig) -> None:
        super().__init__(parameters, config)
        self._momenta: list[Tensor | None] = [None] * len(parameters)
        if config.momentum:
            self.state = {"momentum_buffer": [torch.zeros_like(p) for p in parameters]}
            self._momenta = [*self.state["momentum_buffer"]]

    def step(self, gradients: Tensors, settings: Hyperparameters, found_inf: Tensor) -> None:
        sgd(
            self._parameters,
            gradients,
            self._momenta,
            fused=True,
            found_inf=found_inf,
            weight_decay=self._config.weight_decay,
            momentum=self._config.momentum,
            lr=cast("float", settings.learning_rate),  # a tensor does as well
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Direction:
    """What an optimizer follows; this one is the gradient itself.

    A direction may change the gradient before the optimizer's step, and the parameters after it.

    Attributes:
        tensors: its state by name, changed in place: one tensor per parameter, or one scalar.
        needs_start: whether :meth:`after` reads the parameters before the optimizer's step.
    """

    needs_start = False

    def __init__(self) -> None:
        self.tensors: dict[str, Tensors] = {}

    def before(self, gradients: Sequence[Tensor], ok: Tensor) -> None:
        """Change the gradients in place."""

    def after(self, parameters: Sequence[Tensor], start: Sequence[Tensor], ok: Tensor) -> None:
        """Change the parameters in place, which the optimizer has updated from ``start``."""


class Optimistic(Direction):
    """w ← w + 2Δ − Δ₋₁, where Δ is the optimizer's step and Δ₋₁ the one before; first w + Δ.

    With plain descent Δ = −η F(w), so that w ← w − 2η F(w) + η F(w₋₁); with Adam it is Optimistic
    Adam (Daskalakis et al. 2018). Keeps two copies of the parameters.
    """

    needs_start = True

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = {
            "previous": [torch.zeros_like(p) for p in parameters],
            "started": [parameters[0].detach().new_zeros(())],
        }

    def after(self, parameters: Sequence[Tensor], start: Sequence[Tensor], ok: Tensor) -> None:
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
        g, before = list(gradients), self.tensors["gradient"]
        d, (started,) = self.tensors["direction"], self.tensors["started"]
        beta = self._beta(g, before, d)
        # A restart is needed where ⟨−g + β d₋₁, g⟩ ≥ 0.
        usable = beta.isfinite() & (beta * _dot(d, g) < _dot(g, g)) & (started > 0)
        beta = beta.where(usable, 0.0)
        new = [torch.where(usable, beta * old, 0.0) - now for old, now in zip(d, g, strict=True)]
        for state, values in ((before, g), (d, new)):
            for old, value in zip(state, values, strict=True):
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


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
