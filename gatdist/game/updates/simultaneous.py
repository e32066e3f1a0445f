"""Simultaneous descent, the article's equation: both gradients first, then both moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gatdist.config import BOTH
from gatdist.game.game import Scores
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Phase, Step, UpdateRule, register_update_rule
from gatdist.parallel.batch import Batch


@register_update_rule("simultaneous")
class Simultaneous(UpdateRule):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), both gradients at the same point.

    One forward of the fakes serves both players: the generator's gradient with respect to the fakes
    is taken first, and enters its network in the same backward that gives the discriminator's.
    """

    recordable = True

    def phases(self, step: Step) -> Iterator[Phase]:
        """One phase for both."""
        yield Phase("both", BOTH, step.batch, self._both)

    def _both(self, batch: Batch) -> Observations:
        game = self.game
        real = game.judge_real(batch)
        fakes = game.generate(game.latents(batch), batch)
        fake = game.judge(fakes, batch, "fake")
        to_generator = self._to_generator(batch, real, fake)
        loss, observations = game.discriminator_loss(
            batch, real, fake, penalized=self._penalized(batch, fake)
        )
        penalties, seen = game.generator_penalties(batch)
        # Where the discriminator's gradient would enter the generator, the generator's own does.
        fakes.register_hook(to_generator)
        torch.autograd.backward([loss, *penalties])
        with torch.no_grad():
            observations["loss/generator"] = game.loss.generator(real.logits, fake.logits)
        return observations | seen

    def _to_generator(self, batch: Batch, real: Scores, fake: Scores) -> Callable[[Tensor], Tensor]:
        """Maps ∇ L_D at the fakes to ∇ L_G at the fakes, both weighted."""
        loss = self.game.loss.generator(real.logits.detach(), fake.logits)
        (gradient,) = torch.autograd.grad(batch.mean(loss), fake.samples, retain_graph=True)
        return lambda _: gradient

    def _penalized(self, batch: Batch, fake: Scores) -> Scores:
        """The fake side as penalties at fakes are to see it."""
        return fake
