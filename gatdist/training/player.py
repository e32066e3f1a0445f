"""A player: a network, its optimizer, and the moving average of the generator."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gatdist.config import BatchNormStatistics, PlayerOptimConfig
from gatdist.game import Hyperparameters
from gatdist.models.buffers import batch_norms, running_statistics
from gatdist.models.layers import normalized_weights
from gatdist.parallel.communicator import bare
from gatdist.parallel.reduction import Reduction
from gatdist.training.optim import SGD, Adam, Conjugate, Direction, Optimistic, Optimizer


class Player:
    """One trained network with its optimizer.

    Args:
        network: on its device; replicated over the workers here.
        config: of its optimizer.
        reduction: averages the workers' gradients.
        direction: what the optimizer follows unless the configuration says otherwise.
        lazy_steps: k, if the player has penalties with optimizer steps of their own, every k
            steps; its Adam is corrected by c = k/(k + 1) (Karras et al. 2020). 0: it has none.
        may_skip: whether a backward may leave a parameter without a gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        config: PlayerOptimConfig,
        reduction: Reduction,
        *,
        direction: str = "gradient",
        lazy_steps: int = 0,
        may_skip: bool = False,
    ) -> None:
        self.network = reduction.replicate(network, may_skip=may_skip)
        self.config = config
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._all: list[Tensor] = list(self.parameters.values())
        self._normalized = normalized_weights(network)
        self._correction = 1.0
        if lazy_steps and config.name == "adam":
            self._correction = lazy_steps / (lazy_steps + 1)
        kind = Adam if config.name == "adam" else SGD
        self.optimizer: Optimizer = kind(self._all, config)
        match config.direction or direction:
            case "optimistic":
                self.direction: Direction = Optimistic(self._all)
            case "conjugate":
                self.direction = Conjugate(self._all, config.conjugate_beta)
            case _:
                self.direction = Direction()

    @property
    def bare(self) -> nn.Module:
        """The network without its data-parallel wrapper."""
        return bare(self.network)

    def hyperparameters(self, samples_seen: int) -> Hyperparameters:
        """Return the optimizer's settings after ``samples_seen`` samples."""
        c = self._correction
        beta1, beta2 = (schedule.at(samples_seen) ** c for schedule in self.config.betas)
        return Hyperparameters(c * self.config.learning_rate.at(samples_seen), (beta1, beta2))

    def zero_grad(self) -> None:
        for parameter in self._all:
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self, unscale: Tensor | None = None) -> Tensor:
        """Return the 2-norm of the whole reduced gradient; non-finite if any entry is.

        The gradient is multiplied by ``unscale`` first.
        """
        gradients = self._gradients()
        if unscale is not None:
            torch._foreach_mul_(gradients, unscale)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def step(
        self,
        ok: Tensor,
        norm: Tensor,
        settings: Hyperparameters,
        origin: Sequence[Tensor] | None = None,
    ) -> None:
        """Clip the gradient and make an optimizer step; where ``ok`` (1 or 0) is 0, change nothing.

        Args:
            ok: scalar on the device; the host does not wait for it.
            norm: of the gradient.
            settings: of the optimizer, from :meth:`hyperparameters`.
            origin: parameters to step from instead of the present ones, restored even if ``ok`` is
                0.
        """
        gradients = self._gradients()
        if self.config.clip_norm:
            torch._foreach_mul_(gradients, (self.config.clip_norm / norm).clamp(max=1.0))
        if origin is not None:
            torch._foreach_copy_(self._all, list(origin))
        start = [p.clone() for p in self._all] if self.direction.needs_start else []
        self.direction.before(gradients, ok)
        self.optimizer.step(gradients, settings, 1.0 - ok)
        self.direction.after(self._all, start, ok)
        for normalization, weight in self._normalized:
            normalization.advance(weight)

    def _gradients(self) -> list[Tensor]:
        for parameter in self._all:
            if parameter.grad is None:  # it took no part in this phase
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._all if p.grad is not None]

    def changed_by_step(self) -> list[Tensor]:
        """Return every tensor, buffers aside, that :meth:`step` changes in place."""
        states = [t for tensors in self.optimizer.state.values() for t in tensors]
        directions = [t for tensors in self.direction.tensors.values() for t in tensors]
        return [*self._all, *states, *directions]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the player's state by name.

        Weights and buffers as ``NAME/…``, the optimizer's state as ``optimizer_NAME/PARAMETER/…``,
        the direction's as ``direction_NAME/KIND/PARAMETER``.
        """
        for key, tensor in self.bare.state_dict().items():
            yield f"{name}/{key}", tensor
        for i, parameter_name in enumerate(self.parameters):
            for key, tensors in self.optimizer.state.items():
                yield f"optimizer_{name}/{parameter_name}/{key}", tensors[i]
        for kind, tensors in self.direction.tensors.items():
            names = list(self.parameters) if len(tensors) == len(self.parameters) else ["all"]
            for parameter_name, tensor in zip(names, tensors, strict=True):
                yield f"direction_{name}/{kind}/{parameter_name}", tensor


def ema_weight(half_life_samples: float, num_samples: int) -> float:
    """Return 1 − β after ``num_samples``; 1 for a half-life of 0."""
    return 1 - 0.5 ** (num_samples / half_life_samples) if half_life_samples else 1.0


class MovingAverage:
    """θ̄ ← β θ̄ + (1 − β) θ with β = ½^(batch / half-life), both in samples (Karras et al. 2018).

    Args:
        network: the generator; the average starts from its weights.
        batch_norm: running statistics of batch normalization: ``averaged`` like the weights,
            ``live`` copied like other buffers, ``recomputed`` left to
            :func:`gatdist.training.batch_norm.recompute`.
    """

    def __init__(self, network: nn.Module, batch_norm: BatchNormStatistics = "averaged") -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.batch_norm = batch_norm
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def start(self, network: nn.Module) -> None:
        """Restart the average from ``network``'s weights."""
        self.network.load_state_dict(network.state_dict())

    @torch.no_grad()
    def update(self, network: nn.Module, weight: float | Tensor) -> None:
        """Average in ``network``'s weights with ``weight`` 1 − β; other buffers are copied."""
        if not self._pairs:  # gathered once: going through the modules takes as long as the sum
            self._pairs = self._averaged_and_copied(network)
        (mine, theirs), (buffers, new) = self._pairs
        if isinstance(weight, float):
            torch._foreach_lerp_(mine, theirs, weight)
        else:
            for average, parameter in zip(mine, theirs, strict=True):
                average.lerp_(parameter, weight)
        if buffers:
            torch._foreach_copy_(buffers, new)

    def _averaged_and_copied(self, network: nn.Module) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return (averages, tensors of ``network``): those to average, and those to copy."""
        statistics = {
            id(tensor) for norm in batch_norms(self.network) for tensor in running_statistics(norm)
        }
        averaged: list[tuple[Tensor, Tensor]] = list(
            zip(self.network.parameters(), network.parameters(), strict=True)
        )
        copied: list[tuple[Tensor, Tensor]] = []
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            if id(mine) not in statistics or self.batch_norm == "live":
                copied.append((mine, theirs))
            elif self.batch_norm == "averaged":
                averaged.append((mine, theirs))
        return [([a for a, _ in pairs], [b for _, b in pairs]) for pairs in (averaged, copied)]
