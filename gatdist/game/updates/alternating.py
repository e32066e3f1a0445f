"""Alternating descent: one player moves, then the other at the point that the first has reached.

``order = "discriminator_first"`` is Goodfellow et al. 2014, algorithm 1 with k = 1;
``generator_first`` is the article's procedure in words.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gatdist.game.game import Batch, Observations, frozen
from gatdist.game.updates.rule import Phase, UpdateRule, register_update_rule


@register_update_rule("alternating")
class Alternating(UpdateRule):
    """ψ ← ψ − η ∇_ψ L_D(θ, ψ), then θ ← θ − η ∇_θ L_G(θ, ψ) at the new ψ; or the other way round.

    ``latents = "fresh"`` draws new latents for the generator's phase; ``shared`` uses the
    discriminator's again.
    """

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The discriminator's and the generator's phase, in the configured order."""
        phases = [
            Phase("discriminator", ("discriminator",), lambda: self._discriminator(batch)),
            Phase("generator", ("generator",), lambda: self._generator(batch)),
        ]
        yield from phases if self.config.order == "discriminator_first" else phases[::-1]

    def _discriminator(self, batch: Batch) -> Observations:
        game = self.game
        real = game.judge(game.differentiable(batch.real, batch.step, "real"), batch.labels)
        fake = game.judge(game.differentiable(game.fakes(batch), batch.step, "fake"), batch.labels)
        loss, observations = game.discriminator_loss(batch, real, fake, penalized=fake)
        torch.autograd.backward(loss)
        return observations

    def _generator(self, batch: Batch) -> Observations:
        game = self.game
        stream = "latents" if self.config.latents == "shared" else "latents/generator"
        with frozen(game.discriminator) as discriminator:
            fake_logits = discriminator(
                game.generator(game.latents(batch, stream), batch.labels), batch.labels
            )
            real_logits = torch.zeros_like(fake_logits)
            if game.loss.generator_reads_real:
                with torch.no_grad():
                    real_logits = discriminator(batch.real, batch.labels)
            loss = game.loss.generator(real_logits, fake_logits)
            torch.autograd.backward(loss.mean())
        return {"loss/generator": loss.detach()}
