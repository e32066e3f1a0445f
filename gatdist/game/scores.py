"""What a discriminator returns: logits and features of its sub-discriminators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """A discriminator's outputs for the samples of one side.

    Attributes:
        samples: What it was shown, [n, …].
        maps: Logits of each sub-discriminator, [n] or a map [n, …].
        features: Feature maps [n, …] of each sub-discriminator, if it returns them.
    """

    samples: Tensor
    maps: tuple[Tensor, ...]
    features: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def logits(self) -> Tensor:
        """One number for each sample, [n]: the means over the maps, summed."""
        return mean_over_maps(lambda logits: logits, self)

    def detach(self) -> Scores:
        return Scores(
            self.samples.detach(),
            tuple(logits.detach() for logits in self.maps),
            tuple(tuple(map(torch.Tensor.detach, part)) for part in self.features),
        )


def mean_over_maps(function: Callable[..., Tensor], *sides: Scores) -> Tensor:
    """Average a function of logits over each map; return the sum over sub-discriminators, [n]."""
    total: Tensor | None = None
    for logits in zip(*(side.maps for side in sides), strict=True):
        value = function(*logits)
        if value.dim() > 1:
            value = value.flatten(1).mean(1)
        total = value if total is None else total + value
    assert total is not None
    return total


def parse(output: Any) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]] | None:
    """Return the maps and features in a discriminator's output; None if it is something else.

    The output is logits, or a list with, for each sub-discriminator, logits or a list of features
    with the logits last.
    """
    if isinstance(output, Tensor):
        return (output,), ()
    if not isinstance(output, list | tuple) or not output:
        return None
    parts = [[part] if isinstance(part, Tensor) else part for part in output]
    if not all(
        isinstance(part, list | tuple) and part and all(isinstance(t, Tensor) for t in part)
        for part in parts
    ):
        return None
    return tuple(part[-1] for part in parts), tuple(tuple(part[:-1]) for part in parts)
