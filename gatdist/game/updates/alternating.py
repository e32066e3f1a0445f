"""Alternating descent: the second player's gradient is taken after the first player's step.

``order = "discriminator_first"`` is Goodfellow et al. 2014, algorithm 1, with its k as
``num_discriminator_steps``; ``generator_first`` swaps the players.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gatdist.game.game import frozen
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import Phase, Step, UpdateRule, register_update_rule
from gatdist.parallel.batch import Batch

# Generated fields with their graph, by part of the batch.
Fakes = dict[int, dict[str, Tensor]]


@register_update_rule("alternating")
class Alternating(UpdateRule):
    """ψ ← ψ − η ∇_ψ L_D(θ, ψ), then θ ← θ − η ∇_θ L_G(θ, ψ) at the new ψ; or the other way round.

    ``latents = "fresh"`` draws new latents for the generator's phase; ``shared`` uses the
    discriminator's again, and with ``reuse_fakes`` the fakes made of them, graph and all.
    """

    several_discriminator_steps = True
    recordable = True

    def phases(self, step: Step) -> Iterator[Phase]:
        batches = step.batch.consecutive(self.config.num_discriminator_steps)
        reused: Fakes = {}
        discriminator = [
            Phase("discriminator", ("discriminator",), batch, partial(self._discriminator, reused))
            for batch in batches
        ]
        generator = [
            Phase("generator", ("generator",), self._last(step), partial(self._generator, reused))
        ]
        first = self.config.order == "discriminator_first"
        phases = discriminator + generator if first else generator + discriminator
        yield from phases[:-1]
        yield replace(phases[-1], is_last=True)

    def _last(self, step: Step) -> Batch:
        """Return this worker's share of the last ``generator_batch`` samples."""
        batch, size = step.batch, self.config.generator_batch
        if size is None:
            return batch.consecutive(self.config.num_discriminator_steps)[-1]
        return batch.last(max(1, batch.total * size // self.game.step_samples))

    def _discriminator(self, reused: Fakes, batch: Batch) -> Observations:
        game = self.game
        real = game.backward_real(batch)
        if self.config.reuse_fakes:
            fakes = reused[batch.part] = game.generate(batch)
        else:
            fakes = game.fakes(batch)
        shown = game.differentiable(game.shown(batch, fakes), batch.step, "fake")
        fake = game.discriminate(shown, batch, "fake")
        loss, observations = game.discriminator_loss(batch, real, fake, penalized=fake)
        torch.autograd.backward(loss)
        return observations

    def _generator(self, reused: Fakes, batch: Batch) -> Observations:
        game = self.game
        stream = "latents" if self.config.latents == "shared" else "latents/generator"
        with frozen(game.discriminator) as discriminator:
            fakes = reused.pop(batch.part, None) or game.generate(batch, stream)
            fake = game.discriminate(game.shown(batch, fakes), batch, "generator", discriminator)
            real = game.real_scores(batch, discriminator)
            loss, of_terms = game.generator_loss(batch, fakes, fake, real)
            penalties, observations = game.generator_penalties(batch)
            torch.autograd.backward([batch.mean(loss), *penalties])
        return observations | of_terms | {"loss/generator": loss.detach()}
