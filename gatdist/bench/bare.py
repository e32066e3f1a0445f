"""The alternating step as one writes it by hand in torch: the unit of all ratios."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gatdist.bench.case import HandWritten, Overrides, Size, adam
from gatdist.models import COMPUTE_DTYPES


class Bare(HandWritten):
    """A hand-written loop, with the discriminator frozen while the generator learns.

    The discriminator's phase makes its fakes without a graph, and the generator's makes them again,
    from the same latents: 4 g + 8 d, where g and d are the costs of one forward. That is what needs
    the least memory.
    """

    def __init__(self, size: Size, overrides: Overrides | None = None, device: str = "cpu") -> None:
        super().__init__(size, overrides, device)
        self.g_optimizer = adam(self.generator.parameters(), self.config.optim.generator)
        self.d_optimizer = adam(self.discriminator.parameters(), self.config.optim.discriminator)
        self._dtype = COMPUTE_DTYPES.get(self.config.precision.dtype)

    def step(self) -> None:
        """Discriminator, then generator."""
        latents = self.latents()
        self.learn_to_judge(latents)
        self.learn_to_generate(latents)

    def learn_to_judge(self, latents: Tensor) -> None:
        """The discriminator's phase."""
        with torch.no_grad(), self.computing():
            fakes = self.generator(latents)
        self.move_discriminator(fakes)

    def learn_to_generate(self, latents: Tensor) -> None:
        """The generator's phase."""
        with self.computing():
            fakes = self.generator(latents)
        self.move_generator(fakes)

    def move_discriminator(self, fakes: Tensor) -> None:
        """One step of Adam. ``fakes``: without a graph."""
        self.d_optimizer.zero_grad()
        with self.computing():
            real, fake = self.discriminator(self.real), self.discriminator(fakes)
        loss = softplus(-real.float()) + softplus(fake.float())
        loss.mean().backward()
        self.d_optimizer.step()

    def move_generator(self, fakes: Tensor) -> None:
        """One step of Adam. ``fakes``: with a graph."""
        self.g_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)
        with self.computing():
            fake = self.discriminator(fakes)
        softplus(-fake.float()).mean().backward()
        self.g_optimizer.step()
        self.discriminator.requires_grad_(True)

    def computing(self) -> AbstractContextManager[object]:
        """Around each use of a network."""
        kind = self.real.device.type
        return torch.autocast(kind, self._dtype) if self._dtype else nullcontext()


class BareReusing(Bare):
    """Keeps the graph of the fakes from the first phase for the second: 3 g + 8 d.

    Faster by a forward of the generator, whose activations then lie beside the discriminator's.
    """

    def step(self) -> None:
        """Discriminator, then generator."""
        with self.computing():
            fakes = self.generator(self.latents())
        self.move_discriminator(fakes.detach())
        self.move_generator(fakes)
