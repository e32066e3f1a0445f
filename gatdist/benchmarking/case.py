"""What is measured: networks of three sizes, and everyone who plays the same game with them.

The game is the same in every case: nonsaturating losses without penalties, Adam for both players,
and one fixed batch of made-up pictures, so that no loader is measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.config import Config, PlayerOptimConfig, parse_config
from gatdist.models import DTYPES, build_networks

# Sections of a configuration and what a case has in them.
Overrides = dict[str, dict[str, Any]]

BFLOAT16: Overrides = {"precision": {"dtype": "bfloat16", "channels_last": True}}
# So small that a fixed batch is not learned by heart within a measurement: the gradients of a
# discriminator that is sure of everything are denormal numbers, which CPUs compute slowly.
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Size:
    """A pair of networks and the batch that goes through them.

    Attributes:
        name: for people and ``--size``.
        network: the registered name of both.
        options: of both.
        shape: of one sample, (C, H, W).
        batch: samples that one process shows in a step.
    """

    name: str
    network: str
    options: Mapping[str, Any]
    shape: tuple[int, int, int]
    batch: int

    def config(self, overrides: Overrides, workers: int = 1) -> Config:
        """A run of this size with ``workers`` times the batch; it never ends by itself.

        Raises:
            ConfigError: the overrides are wrong.
        """
        network = {"name": self.network, **self.options}
        optimizer = {"learning_rate": LEARNING_RATE}
        values: dict[str, dict[str, Any]] = {
            "run": {"total_samples": 2**62, "global_batch": self.batch * workers},
            "data": {"url": "made-up"},
            "model": {"generator": network, "discriminator": network},
            "optim": {"generator": optimizer, "discriminator": optimizer},
        }
        for section, keys in overrides.items():
            values[section] = values.get(section, {}) | keys
        return parse_config(values)

    def real(self, config: Config) -> Tensor:
        """The made-up batch of one process, [batch, C, H, W] in [−1, 1]."""
        generator = torch.Generator().manual_seed(0)
        real = torch.rand(self.batch, *self.shape, generator=generator) * 2 - 1
        channels_last = config.precision.channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return real.to(DTYPES[config.precision.dtype], memory_format=layout)


SIZES = {
    size.name: size
    for size in (
        Size("dcgan64_w4", "dcgan", {"width": 4}, (3, 64, 64), 8),
        Size("dcgan64_w32", "dcgan", {"width": 32}, (3, 64, 64), 32),
        Size("residual_w32", "residual", {"width": 32, "max_width": 128}, (3, 32, 32), 16),
    )
}


class Case(ABC):
    """Somebody's way to play the game, ready to take steps.

    Attributes:
        generator: the network that learns, without wrappers.
        discriminator: likewise.
    """

    generator: nn.Module
    discriminator: nn.Module

    @abstractmethod
    def step(self) -> None:
        """One step of the game."""

    def run(self, num_steps: int) -> float:
        """Seconds that ``num_steps`` steps take, after one that warms the caches up."""
        self.step()
        began = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        return time.perf_counter() - began

    def release_gradients(self) -> None:
        """Forget both players' gradients."""
        for network in (self.generator, self.discriminator):
            network.zero_grad(set_to_none=True)


class HandWritten(Case):
    """What the loops that others might write have in common.

    Args:
        size: of the networks and the batch.
        overrides: the precision.

    Attributes:
        config: that of gatdist's cases; the networks and Adam's settings come from it.
        real: the batch.
    """

    def __init__(self, size: Size, overrides: Overrides | None = None) -> None:
        self.size = size
        self.config = size.config(overrides or {})
        self.generator, self.discriminator = build_networks(self.config, size.shape, 0)
        self.real = size.real(self.config)

    def latents(self) -> Tensor:
        """Standard normal [batch, latent_size]."""
        return torch.randn(self.size.batch, self.config.model.latent_size)


def adam(parameters: Iterable[Tensor], config: PlayerOptimConfig) -> torch.optim.Adam:
    """Torch's fastest Adam with a player's settings."""
    return torch.optim.Adam(
        parameters,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
