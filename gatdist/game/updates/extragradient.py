"""Extragradient (Korpelevich 1976; Gidel et al. 2019 for adversarial networks)."""

from __future__ import annotations

from collections.abc import Iterator

from gatdist.config import BOTH
from gatdist.game.updates.rule import Phase, Step, register_update_rule, trainable
from gatdist.game.updates.simultaneous import Simultaneous


@register_update_rule("extragradient")
class Extragradient(Simultaneous):
    """w½ = w − η F(w), then w ← w − η F(w½), with F = (∇_θ L_G, ∇_ψ L_D).

    Both steps go through the optimizers, so that with Adam it is Gidel et al.'s algorithm 4.
    Costs two simultaneous steps and a copy of the parameters.
    """

    def phases(self, step: Step) -> Iterator[Phase]:
        """To w½, and from w with the gradient found there."""
        w = {
            name: [p.detach().clone() for p in trainable(getattr(self.game, name))] for name in BOTH
        }
        yield Phase("extrapolation", BOTH, step.batch, self._both)
        yield Phase("update", BOTH, step.batch, self._both, origin=w)
