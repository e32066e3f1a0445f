"""Registries of networks, and checks of the sample shapes that they take."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.common.registry import Registry

generators: Registry[Callable[..., nn.Module]] = Registry("model.generator.name")
discriminators: Registry[Callable[..., nn.Module]] = Registry("model.discriminator.name")

COARSEST = 4  # shorter side of the coarsest feature maps
_KINDS = {1: "points", 2: "audio or text", 3: "images"}

Size = tuple[int, int]


def require_rank(sample_shape: tuple[int, ...], rank: int, name: str) -> None:
    """Raise ConfigError unless samples have ``rank`` axes: 3 images, 2 audio or text, 1 points."""
    if len(sample_shape) != rank:
        raise ConfigError(
            "model",
            f"{name!r} is for {_KINDS[rank]}, but the data's samples have shape {sample_shape}",
            hint="Choose another model.generator.name and model.discriminator.name",
        )


def require_input(
    input_shapes: tuple[tuple[int, ...], ...], rank: int, what: str, name: str
) -> tuple[int, ...]:
    """Return the shape of the only input, which has ``rank`` axes, or raise ConfigError."""
    if [len(shape) for shape in input_shapes] != [rank]:
        found = " and ".join(str(list(shape)) for shape in input_shapes)
        rule = f"takes one {what}, and the task gives inputs of shape {found}"
        hint = "Choose another network, or another game.task"
        raise ConfigError("model.generator.name", rule, value=name, hint=hint)
    return input_shapes[0]


def require_no_labels(num_classes: int, name: str) -> None:
    """Raise ConfigError for a class-conditional network."""
    if num_classes:
        rule = f"the network {name!r} takes no labels"
        hint = "Set it to false, or choose another network"
        raise ConfigError("model.conditional", rule, value=True, hint=hint)


def halvings(size: Size, smallest: int = COARSEST) -> int:
    """Return how often both sides halve exactly, the shorter one to ``smallest`` or more."""
    count = 0
    while all(side % 2 == 0 for side in size) and min(size) // 2 >= smallest:
        size = size[0] // 2, size[1] // 2
        count += 1
    return count


def require_halvings(sample_shape: tuple[int, ...], name: str, *, least: int, most: int = 8) -> int:
    """Return how often images [C, H, W] halve, down to a shorter side of 4 or more.

    ConfigError for other data or numbers of halvings, with the nearest size that fits as a hint.
    """
    require_rank(sample_shape, 3, name)
    size = sample_shape[1], sample_shape[2]
    count = halvings(size)
    if least <= count <= most:
        return count
    raise ConfigError(
        "data.resolution",
        f"{name!r} takes images whose sides halve {least} to {most} times, to {COARSEST} or more",
        value=list(size),
        hint=f"Set it to {list(_nearest(size, least, most))}, or use the networks 'residual', "
        "which take any size",
    )


def _nearest(size: Size, least: int, most: int) -> Size:
    found = [(COARSEST * 2**most, COARSEST * 2**most)]
    for times in range(least, most + 1):
        height, width = (max(COARSEST, round(side / 2**times)) * 2**times for side in size)
        if least <= halvings((height, width)) <= most:
            found.append((height, width))
    return min(
        found, key=lambda sides: sum(abs(math.log(a / b)) for a, b in zip(sides, size, strict=True))
    )
