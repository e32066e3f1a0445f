"""A player as the step sees it: a network, its optimizer, and how it moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.config import OptimConfig, PlayerOptimConfig
from gatdist.parallel.communicator import Communicator, bare


def learning_rate_factor(config: OptimConfig, samples_seen: int, total_samples: int) -> float:
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
        comm: the workers.
    """

    def __init__(self, network: nn.Module, config: PlayerOptimConfig, comm: Communicator) -> None:
        self.network = comm.replicate(network)
        self.config = config
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(list(self.parameters.values()), config)

    @property
    def bare(self) -> nn.Module:
        """The network without its data-parallel wrapper."""
        return bare(self.network)

    def zero(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """2-norm of the whole reduced gradient, on the device; non-finite if any entry is."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def move(self, finite: Tensor, norm: Tensor, rate_factor: float) -> None:
        """Clip, then step; where ``finite`` (a scalar) is 0, nothing moves or changes.

        The fused optimizers read the flag on the device, so the host never waits for it.
        """
        if self.config.clip_norm:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, (self.config.clip_norm / norm).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_factor
        self.optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]
        self.optimizer.step()

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Weights and buffers as ``NAME/…``, optimizer state as ``optimizer_NAME/PARAMETER/…``."""
        for key, tensor in self.bare.state_dict().items():
            yield f"{name}/{key}", tensor
        for parameter_name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer_{name}/{parameter_name}/{key}", value

    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        device = next(self.bare.parameters()).device
        weights = {
            k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")
        }
        self.bare.load_state_dict(weights)
        for parameter_name, parameter in self.parameters.items():
            prefix = f"optimizer_{name}/{parameter_name}/"
            state = {
                k.removeprefix(prefix): v.to(device)
                for k, v in tensors.items()
                if k.startswith(prefix)
            }
            if state:
                self.optimizer.state[parameter] = state


def _optimizer(parameters: list[nn.Parameter], config: PlayerOptimConfig) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.name == "adam":
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        return kind(parameters, betas=(config.betas[0], config.betas[1]), eps=config.eps, **common)
    optimizer = torch.optim.SGD(parameters, momentum=config.momentum, **common)
    if config.momentum:
        # torch would leave the buffers uninitialized if the very first step were skipped.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
