"""Optimizers with their state in plain lists, so that a step costs little more than its kernel.

They call the functions that torch's optimizers are made of, which read on the device whether a step
is to be left out. Their state is made at once, so that it can be saved, loaded and left alone.
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

Tensors = list[Tensor]


class Optimizer(ABC):
    """Moves parameters along their gradients.

    Args:
        parameters: that learn.
        config: of the optimizer.

    Attributes:
        state: what it remembers, by name, a tensor a parameter, changed in place.
    """

    def __init__(self, parameters: Sequence[Tensor], config: PlayerOptimConfig) -> None:
        self._parameters, self._config = list(parameters), config
        self.state: dict[str, Tensors] = {}

    @abstractmethod
    def step(self, gradients: Tensors, rate: float | Tensor, found_inf: Tensor) -> None:
        """Move.

        Args:
            gradients: of the parameters, laid out in memory as they are.
            rate: the learning rate: a number, or a float32 scalar on the device.
            found_inf: float32 scalar; where it is 1, nothing changes.
        """


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); with ``weight_decay``, AdamW (Loshchilov & Hutter 2019).

    Args:
        parameters: that learn.
        config: of the optimizer.
        correction: the power to which both betas are raised.

    Attributes:
        betas: so corrected.
    """

    def __init__(
        self, parameters: Sequence[Tensor], config: PlayerOptimConfig, correction: float
    ) -> None:
        super().__init__(parameters, config)
        self.betas = config.betas[0] ** correction, config.betas[1] ** correction
        self.state = {
            "step": [torch.zeros((), dtype=torch.float32, device=p.device) for p in parameters],
            "exp_avg": [torch.zeros_like(p) for p in parameters],
            "exp_avg_sq": [torch.zeros_like(p) for p in parameters],
        }

    def step(self, gradients: Tensors, rate: float | Tensor, found_inf: Tensor) -> None:
        """See :meth:`Optimizer.step`."""
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
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=self._config.weight_decay,
            eps=self._config.eps,
            maximize=False,
            decoupled_weight_decay=bool(self._config.weight_decay),
        )


class Descent(Optimizer):
    """Gradient descent, with momentum where it is asked for (Sutskever et al. 2013)."""

    def __init__(self, parameters: Sequence[Tensor], config: PlayerOptimConfig) -> None:
        super().__init__(parameters, config)
        self._momenta: list[Tensor | None] = [None] * len(parameters)
        if config.momentum:
            self.state = {"momentum_buffer": [torch.zeros_like(p) for p in parameters]}
            self._momenta = [*self.state["momentum_buffer"]]

    def step(self, gradients: Tensors, rate: float | Tensor, found_inf: Tensor) -> None:
        """See :meth:`Optimizer.step`."""
        sgd(
            self._parameters,
            gradients,
            self._momenta,
            fused=True,
            found_inf=found_inf,
            weight_decay=self._config.weight_decay,
            momentum=self._config.momentum,
            lr=cast("float", rate),  # a tensor does as well
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def build_optimizer(
    parameters: Sequence[Tensor], config: PlayerOptimConfig, correction: float
) -> Optimizer:
    """The optimizer that ``config`` names; ``correction`` is Adam's."""
    if config.name == "adam":
        return Adam(parameters, config, correction)
    return Descent(parameters, config)
