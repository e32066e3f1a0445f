"""The two registries, apart from the networks that fill them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.common.registry import Registry

generators: Registry[Callable[..., nn.Module]] = Registry("model.generator.name")
discriminators: Registry[Callable[..., nn.Module]] = Registry("model.discriminator.name")

_KINDS = {1: "points", 2: "sounds or texts", 3: "pictures"}


def require_rank(sample_shape: tuple[int, ...], rank: int, name: str) -> None:
    """Raise ConfigError unless samples have ``rank`` axes.

    3 for pictures, 2 for sounds (C, n) and texts (V, n), 1 for points.
    """
    if len(sample_shape) != rank:
        raise ConfigError(
            "model",
            f"{name!r} is for {_KINDS[rank]}, but the data's samples have shape {sample_shape}",
            hint="Choose another model.generator.name and model.discriminator.name",
        )
