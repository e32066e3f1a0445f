"""Rules that take both players' gradients at the same point, then make both optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gatdist.config import BOTH
from gatdist.game.game import Scores
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Phase, Step, UpdateRule, register_update_rule, trainable
from gatdist.parallel.batch import Batch


@register_update_rule("simultaneous")
class Simultaneous(UpdateRule):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), from the same point.

    One forward of the fakes serves both players: the generator's gradient with respect to the fakes
    is taken first, and enters its network in the same backward that gives the discriminator's.
    """

    recordable = True

    def phases(self, step: Step) -> Iterator[Phase]:
        yield Phase("both", BOTH, step.batch, self._both)

    def _both(self, batch: Batch) -> Observations:
        game = self.game
        real_side = game.backward_real(batch)
        real = real_side.scores
        fakes = game.generate(game.latents(batch), batch)
        fake = game.discriminate(fakes, batch, "fake")
        to_generator = self._to_generator(batch, real, fake)
        loss, observations = game.discriminator_loss(
            batch, real_side, fake, penalized=self._penalized(batch, fake)
        )
        penalties, of_generator = game.generator_penalties(batch)
        # Where the discriminator's gradient would enter the generator, the generator's own does.
        fakes.register_hook(to_generator)
        torch.autograd.backward([loss, *penalties])
        with torch.no_grad():
            observations["loss/generator"] = game.loss.generator(real.logits, fake.logits)
        return observations | of_generator

    def _to_generator(self, batch: Batch, real: Scores, fake: Scores) -> Callable[[Tensor], Tensor]:
        """Return the function from ∇ L_D at the fakes to ∇ L_G at the fakes, both weighted."""
        loss = self.game.loss.generator(real.logits.detach(), fake.logits)
        (gradient,) = torch.autograd.grad(batch.mean(loss), fake.samples, retain_graph=True)
        return lambda _: gradient

    def _penalized(self, batch: Batch, fake: Scores) -> Scores:
        """Return the fake side that penalties at fakes differentiate."""
        return fake


@register_update_rule("optimistic")
class Optimistic(Simultaneous):
    """w ← w − 2η F(w) + η F(w₋₁) (Daskalakis et al. 2018): ``simultaneous``, another direction.

    Other rules can have this direction too: ``optim.*.direction = "optimistic"``.
    """

    direction = "optimistic"


@register_update_rule("conjugate")
class Conjugate(Simultaneous):
    """d ← −g + β d₋₁ for each player (Naganuma & Iiduka 2023): ``simultaneous``, another direction.

    Other rules can have this direction too: ``optim.*.direction = "conjugate"``.
    """

    direction = "conjugate"


@register_update_rule("extragradient")
class Extragradient(Simultaneous):
    """w½ = w − η F(w), then w ← w − η F(w½), with F = (∇_θ L_G, ∇_ψ L_D) (Korpelevich 1976).

    Both steps go through the optimizers, so that with Adam it is algorithm 4 of Gidel et al. 2019.
    Costs two simultaneous steps and a copy of the parameters.
    """

    def phases(self, step: Step) -> Iterator[Phase]:
        w = {
            name: [p.detach().clone() for p in trainable(getattr(self.game, name))] for name in BOTH
        }
        yield Phase("extrapolation", BOTH, step.batch, self._both)
        yield Phase("update", BOTH, step.batch, self._both, origin=w)
