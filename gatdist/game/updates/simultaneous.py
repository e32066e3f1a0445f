"""Rules that take both players' gradients at the same point, then make both optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from gatdist.config import BOTH
from gatdist.game.penalties import Observations
from gatdist.game.scores import Scores
from gatdist.game.updates.rule import Phase, Step, UpdateRule, register_update_rule, trainable
from gatdist.parallel.batch import Batch

Hook = Callable[[Tensor], Tensor]


@register_update_rule("simultaneous")
class Simultaneous(UpdateRule):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), from the same point.

    One forward of the fakes serves both players: the generator's gradient with respect to the fakes
    is taken first, and enters its network in the same backward that gives the discriminator's.
    """

    recordable = True

    def phases(self, step: Step) -> Iterator[Phase]:
        yield Phase("both", BOTH, step.batch, self._both, is_last=True)

    def _both(self, batch: Batch) -> Observations:
        game = self.game
        real_side = game.backward_real(batch)
        real = real_side.scores
        fakes = game.generate(batch)
        fake = game.discriminate(game.shown(batch, fakes), batch, "fake")
        to_generator, of_generator = self._to_generator(batch, real, fake, fakes)
        loss, observations = game.discriminator_loss(
            batch, real_side, fake, penalized=self._penalized(batch, fake)
        )
        penalties, of_penalties = game.generator_penalties(batch)
        # Where the discriminator's gradient would enter the generator, the generator's own does.
        for name, hook in to_generator.items():
            fakes[name].register_hook(hook)
        torch.autograd.backward([loss, *penalties])
        return observations | of_generator | of_penalties

    def _to_generator(
        self, batch: Batch, real: Scores, fake: Scores, fakes: Mapping[str, Tensor]
    ) -> tuple[dict[str, Hook], Observations]:
        """Return, by generated field, the function from ∇ L_D to ∇ L_G at it, both weighted."""
        loss, observations = self.game.generator_loss(batch, fakes, fake, real.detach())
        gradients = torch.autograd.grad(batch.mean(loss), list(fakes.values()), retain_graph=True)
        hooks = {name: _replaced(g) for name, g in zip(fakes, gradients, strict=True)}
        return hooks, observations | {"loss/generator": loss.detach()}

    def _penalized(self, batch: Batch, fake: Scores) -> Scores:
        """Return the fake side that penalties at fakes differentiate."""
        return fake


def _replaced(gradient: Tensor) -> Hook:
    return lambda _: gradient


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
        yield Phase("update", BOTH, step.batch, self._both, origin=w, is_last=True)
