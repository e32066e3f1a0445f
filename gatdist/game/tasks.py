"""Tasks: what the generator receives of a sample, and what the discriminator sees of it.

A sample is a record of named fields, each a tensor whose first axis is the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gatdist.common.registry import Registry

Fields = Mapping[str, Tensor]


class Task:
    """The defaults of all tasks.

    Attributes:
        target: Field that the generator makes; the real samples are of this field.
        takes_latents: Whether latents are the generator's first argument.
    """

    target: ClassVar[str] = "sample"
    takes_latents: ClassVar[bool] = False

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        """Return the generator's arguments before the labels, without latents, [n, …] each."""
        return ()

    def shown(self, fields: Fields) -> Tensor:
        """Return the discriminator's input, [n, …]. The field ``target`` is real or generated."""
        return fields[self.target]


tasks: Registry[type[Task]] = Registry("game.task")


@tasks.register("generation")
class Generation(Task):
    """Latents → samples (Goodfellow et al. 2014)."""

    takes_latents = True


@tasks.register("translation")
class Translation(Task):
    """Images ``input`` → images ``target``; the discriminator sees both (Isola et al. 2017)."""

    target = "target"

    def inputs(self, fields: Fields) -> tuple[Tensor, ...]:
        return (fields["input"],)

    def shown(self, fields: Fields) -> Tensor:
        return torch.cat([fields["input"], fields["target"]], 1)
