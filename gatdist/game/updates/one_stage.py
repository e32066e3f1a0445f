"""The one-stage step: the simultaneous gradients from one forward and one backward.

Shen et al. 2021, "Training Generative Adversarial Networks in One Stage".
With one logit ℓ a sample and no coupling between samples, the generator's gradient with respect to
a fake is the discriminator's times γ = g′(ℓ)/d′(ℓ). So the discriminator's loss is backpropagated
once, and each sample's gradient is multiplied by its γ where it enters the generator. It stays
*one* backward through both networks, so that the discriminator's gradients travel while the
generator's are computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gatdist.config import GameConfig
from gatdist.errors import ConfigError
from gatdist.game.game import Batch, Game, Judged, Observations
from gatdist.game.losses import losses
from gatdist.game.updates.rule import Phase, UpdateRule, register_update_rule
from gatdist.parallel.communicator import bare


@register_update_rule("one_stage")
class OneStage(UpdateRule):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), as ``simultaneous``.

    Raises:
        ConfigError: the loss has no ratio γ, or the discriminator couples the samples of a batch.
    """

    def __init__(self, game: Game, config: GameConfig) -> None:
        super().__init__(game, config)
        if game.loss.ratio is None:
            known = [name for name in losses.names() if losses[name].ratio]
            raise ConfigError(
                "game.loss",
                "can't be used with game.update_rule = 'one_stage': its derivative can be 0",
                value=config.loss,
                mend=f"Use the rule 'simultaneous', or one of the losses {', '.join(known)}",
            )
        for name, module in bare(game.discriminator).named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ConfigError(
                    "game.update_rule",
                    f"not exact: layer {name!r} ({type(module).__name__}) couples samples",
                    value="one_stage",
                    mend="Use 'simultaneous', or a discriminator without batch normalization",
                )

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """One phase for both."""
        yield Phase("both", ("generator", "discriminator"), lambda: self._both(batch))

    def _both(self, batch: Batch) -> Observations:
        game = self.game
        assert game.loss.ratio is not None
        fakes = game.generator(game.latents(batch), batch.labels)
        real = game.judge(game.differentiable(batch.real, batch.step, "real"), batch.labels)
        fake = game.judge(fakes, batch.labels)
        ratio = game.loss.ratio(real.logits.detach(), fake.logits.detach())  # γ: [n]
        ratio = ratio.view(-1, *[1] * (fakes.dim() - 1))  # one factor a sample, for all its pixels
        fakes.register_hook(lambda gradient: gradient * ratio)
        loss, observations = game.discriminator_loss(
            batch, real, fake, penalized=self._apart(batch, fakes)
        )
        torch.autograd.backward(loss)
        with torch.no_grad():
            observations["loss/generator"] = game.loss.generator(real.logits, fake.logits)
        return observations

    def _apart(self, batch: Batch, fakes: Tensor) -> Judged:
        """The fakes cut off from the generator, so that no penalty at fakes reaches the hook."""
        leaf = self.game.differentiable(fakes, batch.step, "fake")
        return (
            self.game.judge(leaf, batch.labels)
            if leaf.requires_grad
            else Judged(leaf, leaf.new_empty(0))
        )
