"""What a discriminator has learned to see: its features before the last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError


class DiscriminatorFeatures(nn.Module):
    """Samples [n, …] → features [n, k]: what enters the discriminator's layer ``finish``.

    Args:
        discriminator: a network whose last layer is called ``finish``, as in all that come with the
            package; or one around such a network.

    Raises:
        ConfigError: it has no such layer.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        found = [m for name, m in discriminator.named_modules() if name.split(".")[-1] == "finish"]
        if not found:
            raise ConfigError(
                "model.discriminator.name",
                "has no layer 'finish', whose inputs would be its features",
                value=type(discriminator).__name__,
                hint="Call its last layer so",
            )
        self.discriminator = discriminator
        self._seen: list[Tensor] = []
        self._handle = found[0].register_forward_pre_hook(self._see)

    def close(self) -> None:
        """Leave the discriminator as it was."""
        self._handle.remove()

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen.append(inputs[0])

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features [n, k] of samples [n, …]; a conditional network may be told labels int64 [n]."""
        self._seen.clear()
        if labels is None and getattr(self.discriminator, "embedding", None) is not None:
            labels = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
        self.discriminator(samples, labels)
        return self._seen.pop().flatten(1)
