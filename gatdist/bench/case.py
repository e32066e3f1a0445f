"""What is measured: networks of some sizes, and everyone who plays the same game with them.

The game is the same in every case: nonsaturating losses without penalties, Adam for both players,
and one fixed batch of made-up samples, so that no loader is measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.bench.reference import reference_networks
from gatdist.config import Config, PlayerOptimConfig, parse_config
from gatdist.models import DTYPES

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
        shape: of one sample as networks see it.
        batch: samples that one process shows in a step.
        model: more of the section ``model``.
    """

    name: str
    network: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    batch: int
    model: Mapping[str, Any] = field(default_factory=dict)

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
            "model": {"generator": network, "discriminator": network, **self.model},
            "optim": {"generator": optimizer, "discriminator": optimizer},
        }
        for section, keys in overrides.items():
            values[section] = values.get(section, {}) | keys
        return parse_config(values)

    def real(self, config: Config) -> Tensor:
        """The made-up batch of one process, [batch, *shape] in [−1, 1]."""
        generator = torch.Generator().manual_seed(0)
        real = torch.rand(self.batch, *self.shape, generator=generator) * 2 - 1
        channels_last = config.precision.channels_last and real.dim() == 4
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return real.to(DTYPES[config.precision.dtype], memory_format=layout)


USUAL_SIZES = (
    Size("dcgan64_w4", "dcgan", {"width": 4}, (3, 64, 64), 8),
    Size("dcgan64_w32", "dcgan", {"width": 32}, (3, 64, 64), 32),
    Size("residual_w32", "residual", {"width": 32, "max_width": 128}, (3, 32, 32), 16),
)
# One of each family; their discriminators judge fakes of the same family.
_R3GAN = {"width": 16, "max_width": 64, "group_width": 8, "blocks": 1}
_STYLEGAN2 = {"capacity": 1024, "max_width": 64}
_BOTH = {"spectral_norm": ["generator", "discriminator"]}
FAMILY_SIZES = (
    Size("sngan32", "sngan", {"width": 32}, (3, 32, 32), 16, {"spectral_norm": ["discriminator"]}),
    Size("biggan32", "biggan", {"width": 16}, (3, 32, 32), 16, _BOTH),
    Size("r3gan32", "r3gan", _R3GAN, (3, 32, 32), 16),
    Size("stylegan2_32", "stylegan2", _STYLEGAN2, (3, 32, 32), 16),
    Size("wavegan4096", "wavegan", {"width": 8}, (1, 4096), 16),
    Size("text16", "text_convolutional", {"width": 64, "blocks": 3}, (27, 16), 32),
)
SIZES = {size.name: size for size in (*USUAL_SIZES, *FAMILY_SIZES)}


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
        _wait_for_the_device()
        began = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        _wait_for_the_device()
        return time.perf_counter() - began

    def release_gradients(self) -> None:
        """Forget both players' gradients."""
        for network in (self.generator, self.discriminator):
            network.zero_grad(set_to_none=True)


def _wait_for_the_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class HandWritten(Case):
    """What the loops that others might write have in common.

    Args:
        size: of the networks and the batch.
        overrides: the precision.
        device: where all of it is.

    Attributes:
        config: that of gatdist's cases; the networks and Adam's settings come from it.
        real: the batch.
    """

    def __init__(self, size: Size, overrides: Overrides | None = None, device: str = "cpu") -> None:
        self.size = size
        self.config = size.config(overrides or {})
        self.generator, self.discriminator = reference_networks(self.config, size.shape)
        self.generator.to(device)
        self.discriminator.to(device)
        self.real = size.real(self.config).to(device)

    def latents(self) -> Tensor:
        """Standard normal [batch, latent_size]."""
        latent_size = self.config.model.latent_size
        return torch.randn(self.size.batch, latent_size, device=self.real.device)


def adam(parameters: Iterable[Tensor], config: PlayerOptimConfig) -> torch.optim.Adam:
    """Torch's fastest Adam with a player's settings."""
    return torch.optim.Adam(
        parameters,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
