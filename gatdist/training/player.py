"""A player as the step sees it: a network, its optimizer, and how it moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gatdist.config import PlayerOptimConfig
from gatdist.models.layers import normalized_weights
from gatdist.parallel.communicator import bare
from gatdist.parallel.reduction import Reduction
from gatdist.training.directions import build_direction
from gatdist.training.optimizers import build_optimizer


def learning_rate_factor(config: PlayerOptimConfig, samples_seen: int, total_samples: int) -> float:
    """The schedule's factor in [0, 1]: linear warm-up, plateau, then decay to the end."""
    factor = 1.0
    if samples_seen < config.warmup_samples:
        factor = (samples_seen + 1) / config.warmup_samples
    start = config.decay_start_samples
    if config.decay != "none" and samples_seen > start:
        progress = min(1.0, (samples_seen - start) / max(1, total_samples - start))
        falling = (
            1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        factor *= config.final_fraction + (1 - config.final_fraction) * falling
    return min(factor, 1.0)


class Player:
    """One network that learns.

    Args:
        network: on its device; replicated over the workers here.
        config: of its optimizer.
        reduction: what makes the workers' gradients one.
        direction: what the optimizer follows, where the configuration leaves it open.
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
        correction = lazy_steps / (lazy_steps + 1) if lazy_steps else 1.0
        corrects = config.name == "adam"
        self.learning_rate = config.learning_rate * (correction if corrects else 1.0)
        self._all: list[Tensor] = list(self.parameters.values())
        self._normalized = normalized_weights(network)
        self.optimizer = build_optimizer(self._all, config, correction)
        self.direction = build_direction(
            config.direction or direction, self._all, config.conjugate_beta
        )

    @property
    def bare(self) -> nn.Module:
        """The network without its data-parallel wrapper."""
        return bare(self.network)

    def rate(self, samples_seen: int, total_samples: int) -> float:
        """The learning rate at a time of the run."""
        return self.learning_rate * learning_rate_factor(self.config, samples_seen, total_samples)

    def zero(self) -> None:
        """Forget the gradient."""
        for parameter in self._all:
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self, unscale: Tensor | None = None) -> Tensor:
        """2-norm of the whole reduced gradient, on the device; non-finite if any entry is.

        Args:
            unscale: what the gradient is multiplied by first.
        """
        gradients = self._gradients()
        if unscale is not None:
            torch._foreach_mul_(gradients, unscale)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def move(
        self, ok: Tensor, norm: Tensor, rate: float | Tensor, origin: Sequence[Tensor] | None = None
    ) -> None:
        """Clip, then step; where ``ok`` (a scalar) is 0, nothing moves or changes.

        The fused optimizers read the flag on the device, so the host never waits for it.

        Args:
            ok: 1 or 0.
            norm: the gradient's.
            rate: the learning rate: a number, or a float32 scalar on the device.
            origin: parameters to go back to first, also where ``ok`` is 0.
        """
        gradients = self._gradients()
        if self.config.clip_norm:
            torch._foreach_mul_(gradients, (self.config.clip_norm / norm).clamp(max=1.0))
        if origin is not None:
            torch._foreach_copy_(self._all, list(origin))
        start = [p.clone() for p in self._all] if self.direction.needs_start else []
        self.direction.before(gradients, ok)
        self.optimizer.step(gradients, rate, 1.0 - ok)
        self.direction.after(self._all, start, ok)
        for normalization, weight in self._normalized:
            normalization.advance(weight)

    def _gradients(self) -> list[Tensor]:
        for parameter in self._all:
            if parameter.grad is None:  # it took no part in this phase
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._all if p.grad is not None]

    def moving(self) -> list[Tensor]:
        """Every tensor that :meth:`move` changes in place."""
        states = [t for tensors in self.optimizer.state.values() for t in tensors]
        directions = [t for tensors in self.direction.tensors.values() for t in tensors]
        return [*self.bare.state_dict().values(), *states, *directions]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """All that the player has learned, by name.

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
