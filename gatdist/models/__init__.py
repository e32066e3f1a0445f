"""Generators and discriminators, by name.

A generator's builder takes ``latent_size``, ``sample_shape`` ((C, H, W) for pictures, (n,) for
points, (C, t) for sounds, (V, t) for texts) and ``num_classes`` (0: unconditional) as keywords,
then options of its own with defaults. It returns a module with ``forward(latents [n, latent_size],
labels int64 [n] | None) -> samples [n, *sample_shape]``: of pictures and sounds in about [−1, 1],
of texts probabilities. A discriminator's builder takes ``sample_shape`` and ``num_classes``; its
module has ``forward(samples [n, *sample_shape], labels) -> logits [n]``. A builder with a parameter
``sample_rate`` gets that of the sounds.

A network that is random beside its inputs has an attribute ``noise_size`` (see
:mod:`gatdist.models.noise`). One whose ``modalities`` say what it is for (``image``, ``points``,
``audio``, ``text`` or ``tokens``) is refused for other data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gatdist.config import Config, NamedConfig, PlayerName
from gatdist.errors import ConfigError
from gatdist.models.registry import discriminators, generators
from gatdist.models.spectral import add_spectral_norm
from gatdist.registry import Registry, call_with_options

# Importing these modules registers what they define.
from . import mlp, pictures, sounds, texts  # noqa: F401  isort:skip

__all__ = ["build_networks", "register_discriminator", "register_generator"]

# Of parameters and samples, and of what the networks compute in where that is another.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float16": torch.float32,
    "float64": torch.float64,
}
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Builder = Callable[..., nn.Module]


def register_generator(name: str) -> Callable[[Builder], Builder]:
    """Decorator: makes a builder (see the module) available as ``model.generator.name``."""
    return generators.register(name)


def register_discriminator(name: str) -> Callable[[Builder], Builder]:
    """Decorator: makes a builder (see the module) available as ``model.discriminator.name``."""
    return discriminators.register(name)


def _build(
    registry: Registry[Builder],
    wanted: NamedConfig,
    player: PlayerName,
    facts: Mapping[str, Any],
    **given: Any,
) -> nn.Module:
    builder = registry[wanted.name]
    known = inspect.signature(builder).parameters
    given |= {name: value for name, value in facts.items() if name in known}
    network = call_with_options(builder, wanted.options, f"model.{player}", **given)
    made, found = getattr(network, "modalities", None), facts.get("modality")
    if made and found and found not in made:
        kinds = " or ".join(map(repr, made))
        raise ConfigError(
            f"model.{player}.name",
            f"is for data of the kind {kinds}, and this is {found!r}",
            value=wanted.name,
            mend="Choose another network, or another data.url",
        )
    return network


def build_networks(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[nn.Module, nn.Module]:
    """The generator and the discriminator that ``config`` names, on the CPU, in its dtype.

    Args:
        config: of the run; ``run.seed`` gives the weights, and torch's own random state is left
            alone.
        sample_shape: of one sample, (C, H, W) or (n,).
        num_classes: of the data; 0 if unlabelled.
        facts: what else is known of the samples: their ``modality``, the ``sample_rate`` of sounds.

    Raises:
        ConfigError: an unknown name or option, a shape or kind of samples that a network can't do,
            or labels that are missing.
    """
    model = config.model
    if model.conditional and not num_classes:
        raise ConfigError(
            "model.conditional",
            "the data has no labels",
            value=True,
            mend="Pack it with labels, or set false",
        )
    common = {"sample_shape": sample_shape, "num_classes": num_classes if model.conditional else 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        generator = _build(
            generators, model.generator, "generator", facts, latent_size=model.latent_size, **common
        )
        discriminator = _build(
            discriminators, model.discriminator, "discriminator", facts, **common
        )
        for player, network in (("generator", generator), ("discriminator", discriminator)):
            if player in model.spectral_norm:
                add_spectral_norm(network)
    dtype = DTYPES[config.precision.dtype]
    layout = torch.channels_last if config.precision.channels_last else torch.preserve_format
    for network in (generator, discriminator):
        network.to(dtype)
        network.to(memory_format=layout)  # type: ignore[call-overload]  # stubs lack it
    return generator, discriminator
