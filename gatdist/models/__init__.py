"""Generators and discriminators, by name.

A builder is a function or class that takes keywords: a generator's ``latent_size``,
``sample_shape`` ((C, H, W) for images, (n,) for points, (C, t) for audio, (V, t) for text) and
``num_classes`` (0: unconditional), a discriminator's the last two, then options with defaults. One
with a parameter ``sample_rate`` gets that of the audio, in hertz.

A generator has ``forward(latents [n, latent_size], labels int64 [n] | None) -> samples
[n, *sample_shape]``: images and audio in about [−1, 1], for text probabilities. A discriminator has
``forward(samples [n, *sample_shape], labels) -> logits [n]``.

A network with an attribute ``noise_size: int`` is random itself: its forward takes
standard normal noise [n, noise_size] as last argument. gatdist draws it by the sample's position in
the run, so that the result does not depend on the number of workers. A network with ``modalities``
(``image``, ``points``, ``audio``, ``text`` or ``tokens``) is refused for other data.

Unless their docstrings differ, built-in generators embed labels into the latents, and
discriminators take them by projection (Miyato & Koyama 2018).
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gatdist.common.errors import ConfigError, PluginError, nearest
from gatdist.common.registry import Registry, call_with_options, user_code
from gatdist.common.seeding import generators_kept, seed_all
from gatdist.config import Config, NamedConfig, PlayerName
from gatdist.models.layers import add_spectral_norm
from gatdist.models.registry import discriminators, generators
from gatdist.models.structure import require_apart, require_trainable

# Importing these modules registers what they define.
from . import mlp, image, audio, hifigan, vocos, text  # noqa: F401  isort:skip

__all__ = ["build_networks", "register_discriminator", "register_generator"]

# Of parameters and samples; and of the networks' computation where that differs.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float16": torch.float32,
    "float64": torch.float64,
}
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Builder = Callable[..., nn.Module]
_GIVEN = {"latent_size": "latents", "input_shapes": "fields of the data"}


def register_generator(name: str) -> Callable[[Builder], Builder]:
    """Register a builder of generators, for ``model.generator.name``."""
    return generators.register(name)


def register_discriminator(name: str) -> Callable[[Builder], Builder]:
    """Register a builder of discriminators, for ``model.discriminator.name``."""
    return discriminators.register(name)


def is_built_in(config: Config, player: PlayerName) -> bool:
    """Return whether the network of ``player`` comes with gatdist."""
    registry = generators if player == "generator" else discriminators
    builder = registry[getattr(config.model, player).name]
    return getattr(builder, "__module__", "").startswith(f"{__name__}.")


def _build(
    registry: Registry[Builder],
    requested: NamedConfig,
    player: PlayerName,
    metadata: Mapping[str, Any],
    **given: Any,
) -> nn.Module:
    builder, subject = registry[requested.name], f"model.{player}.name"
    with user_code(subject, "can't be called to build a network", value=requested.name):
        known = inspect.signature(builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    _require_modality(builder, requested.name, player, metadata)
    lacking = [name for name in given if name not in known and not takes_all]
    if lacking and getattr(builder, "__module__", "").startswith(f"{__name__}."):
        rule = f"takes no {_GIVEN[lacking[0]]}, which the task gives its generator"
        hint = "Choose another network, or another game.task"
        raise ConfigError(subject, rule, value=requested.name, hint=hint)
    if lacking:
        rule = f"its constructor must take the keywords {', '.join(given)}; lacks {lacking[0]}"
        hint = f"Add a keyword argument {lacking[0]!r}"
        raise PluginError(subject, rule, value=requested.name, hint=hint)
    given |= {name: value for name, value in metadata.items() if name in known}
    with user_code(subject, "fails in its constructor", value=requested.name):
        network = call_with_options(builder, requested.options, f"model.{player}", **given)
    require_trainable(player, requested.name, network)
    _require_modality(network, requested.name, player, metadata)
    return network


def _require_modality(
    made: object, name: str, player: PlayerName, metadata: Mapping[str, Any]
) -> None:
    """Refuse a network, or what builds it, if it is for other data."""
    fitting, found = getattr(made, "modalities", None), metadata.get("modality")
    if fitting and found and found not in fitting:
        kinds = " or ".join(map(repr, fitting))
        rule, hint = f"is for {kinds} data, and this is {found!r}", "Choose another network or data"
        raise ConfigError(f"model.{player}.name", rule, value=name, hint=hint)


def _freeze(network: nn.Module, patterns: Sequence[str], player: PlayerName) -> None:
    """Exclude parameters from training by their names."""
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            rule = "matches no parameter of the network"
            hint = nearest(pattern, {f"{name.partition('.')[0]}.*" for name in parameters})
            raise ConfigError(f"optim.{player}.freeze", rule, value=pattern, hint=hint)
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        rule = "leaves no parameter to train"
        raise ConfigError(f"optim.{player}.freeze", rule, value=list(patterns))


def build_networks(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    *,
    inputs: tuple[tuple[int, ...], ...] = (),
    shown: tuple[int, ...] | None = None,
    takes_latents: bool = True,
) -> tuple[nn.Module, nn.Module]:
    """Build the configured generator and discriminator, on the CPU, in the configured dtype.

    ``run.seed`` seeds the weights; torch's random state is unchanged. ``metadata`` of the samples:
    ``modality``, and ``sample_rate`` of audio in hertz. ``inputs`` are the shapes of the
    generator's inputs besides latents, which it takes if ``takes_latents``; ``shown`` is that of
    the discriminator's input, by default ``sample_shape``.
    """
    model = config.model
    if model.conditional and not num_classes:
        hint = "Pack it with labels, or set it to false"
        raise ConfigError("model.conditional", "the data has no labels", value=True, hint=hint)
    classes = {"num_classes": num_classes if model.conditional else 0}
    common = {"sample_shape": sample_shape, **classes}
    with generators_kept():
        seed_all(config.run.seed, "weights", 0)
        torch.manual_seed(config.run.seed)
        received: dict[str, Any] = {"input_shapes": inputs} if inputs else {}
        if takes_latents:
            received["latent_size"] = model.latent_size
        generator = _build(generators, model.generator, "generator", metadata, **received, **common)
        common["sample_shape"] = shown or sample_shape
        discriminator = _build(
            discriminators, model.discriminator, "discriminator", metadata, **common
        )
        networks: dict[PlayerName, nn.Module]
        networks = {"generator": generator, "discriminator": discriminator}
        for player, network in networks.items():
            _freeze(network, getattr(config.optim, player).freeze, player)
        for player, network in networks.items():  # in this order, since it draws
            if player in model.spectral_norm:
                add_spectral_norm(network)
    dtype = DTYPES[config.precision.dtype]
    layout = torch.channels_last if config.precision.channels_last else torch.preserve_format
    for player, network in networks.items():
        name = getattr(model, player).name
        with user_code(f"model.{player}.name", f"can't be converted to {dtype}", value=name):
            network.to(dtype)
            network.to(memory_format=layout)  # type: ignore[call-overload]  # stubs lack it
    require_apart(generator, discriminator)
    return generator, discriminator
