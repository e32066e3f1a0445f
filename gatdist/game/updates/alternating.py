"""Alternating descent: one player moves, then the other at the point that the first has reached.

``order = "discriminator_first"`` is Goodfellow et al. 2014, algorithm 1, with its k as
``num_discriminator_steps``; ``generator_first`` is the article's procedure in words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from gatdist.config import GameConfig
from gatdist.game.game import Game, frozen
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Phase, Step, UpdateRule, register_update_rule
from gatdist.parallel.batch import Batch


@register_update_rule("alternating")
class Alternating(UpdateRule):
    """ψ ← ψ − η ∇_ψ L_D(θ, ψ), then θ ← θ − η ∇_θ L_G(θ, ψ) at the new ψ; or the other way round.

    ``latents = "fresh"`` draws new latents for the generator's phase; ``shared`` uses the
    discriminator's again, and with ``reuse_fakes`` the fakes made of them, graph and all.
    """

    several_discriminator_steps = True
    recordable = True

    def __init__(self, game: Game, config: GameConfig) -> None:
        super().__init__(game, config)
        # Parts come in the same order in both phases.
        self._kept: deque[Tensor] = deque()

    def phases(self, step: Step) -> Iterator[Phase]:
        """The discriminator's phases, each at its own batch, and the generator's, as ordered."""
        batches = step.batch.consecutive(self.config.num_discriminator_steps)
        discriminator = [
            Phase("discriminator", ("discriminator",), batch, self._discriminator)
            for batch in batches
        ]
        generator = [Phase("generator", ("generator",), batches[-1], self._generator)]
        first = self.config.order == "discriminator_first"
        yield from discriminator + generator if first else generator + discriminator

    def _discriminator(self, batch: Batch) -> Observations:
        game = self.game
        real = game.judge_real(batch)
        if self.config.reuse_fakes:
            fakes = game.generate(game.latents(batch), batch)
            self._kept.append(fakes)
        else:
            fakes = game.fakes(batch)
        fake = game.judge(game.differentiable(fakes, batch.step, "fake"), batch, "fake")
        loss, observations = game.discriminator_loss(batch, real, fake, penalized=fake)
        torch.autograd.backward(loss)
        return observations

    def _generator(self, batch: Batch) -> Observations:
        game = self.game
        stream = "latents" if self.config.latents == "shared" else "latents/generator"
        with frozen(game.discriminator) as discriminator:
            if self._kept:
                fakes = self._kept.popleft()
            else:
                fakes = game.generate(game.latents(batch, stream), batch)
            fake = game.judge(fakes, batch, "generator", discriminator).logits
            real = torch.zeros_like(fake)
            if game.loss.generator_reads_real:
                with torch.no_grad():
                    real = game.judge(batch.real, batch, "real", discriminator).logits
            loss = game.loss.generator(real, fake)
            penalties, observations = game.generator_penalties(batch)
            torch.autograd.backward([batch.mean(loss), *penalties])
        return observations | {"loss/generator": loss.detach()}
