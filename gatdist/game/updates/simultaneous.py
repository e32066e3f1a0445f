"""Simultaneous descent, the article's equation: both gradients first, then both moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gatdist.game.game import Batch, Observations
from gatdist.game.updates.rule import Phase, UpdateRule, register_update_rule


@register_update_rule("simultaneous")
class Simultaneous(UpdateRule):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), both gradients at the same point.

    One forward of the fakes serves both players: the generator's gradient with respect to the fakes
    is taken first and enters its network in the same backward that gives the discriminator's.
    """

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """One phase for both."""
        yield Phase("both", ("generator", "discriminator"), lambda: self._both(batch))

    def _both(self, batch: Batch) -> Observations:
        game = self.game
        fakes = game.generator(game.latents(batch), batch.labels)
        leaf = fakes.detach().requires_grad_()
        real = game.judge(game.differentiable(batch.real, batch.step, "real"), batch.labels)
        fake = game.judge(leaf, batch.labels)
        generator_loss = game.loss.generator(real.logits.detach(), fake.logits)
        (to_fakes,) = torch.autograd.grad(generator_loss.mean(), leaf, retain_graph=True)
        loss, observations = game.discriminator_loss(batch, real, fake, penalized=fake)
        torch.autograd.backward([loss, fakes], [None, to_fakes])
        return observations | {"loss/generator": generator_loss.detach()}
