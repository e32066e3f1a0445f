"""The one-stage step: the simultaneous gradients from one forward and one backward.

Shen et al. 2021, "Training Generative Adversarial Networks in One Stage".
With one logit ℓ a sample and no coupling between samples, the generator's gradient with respect to
a fake is the discriminator's times γ = g′(ℓ)/d′(ℓ). So the discriminator's loss is backpropagated
once, and each sample's gradient is multiplied by its γ where it enters the generator. It stays
*one* backward through both networks, so that the discriminator's gradients travel while the
generator's are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.config import GameConfig
from gatdist.game.coupling import coupling_layer
from gatdist.game.game import Game, Scores
from gatdist.game.losses import losses
from gatdist.game.penalties import Observations
from gatdist.game.updates.rule import register_update_rule
from gatdist.game.updates.simultaneous import Simultaneous
from gatdist.parallel import devices
from gatdist.parallel.batch import Batch

_UNUSABLE = "one_stage/unusable"


@register_update_rule("one_stage")
class OneStage(Simultaneous):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), as ``simultaneous``.

    Where a sample's γ is so large that the discriminator's gradient has no digits left to multiply
    (d′ ≈ 0), the gradients of that part of the batch are taken as ``simultaneous`` takes them.
    On CUDA, where looking at γ would make the host wait, such a step comes out non-finite and
    is skipped, and from the next tick on all steps are those of ``simultaneous``
    (:meth:`reconsider`).

    Raises:
        ConfigError: the loss has no ratio γ, or the discriminator couples the samples of a batch.
    """

    def __init__(self, game: Game, config: GameConfig) -> None:
        super().__init__(game, config)
        self._noted = False
        if game.loss.ratio is None:
            known = [name for name in losses.names() if losses[name].ratio]
            raise ConfigError(
                "game.loss",
                "can't be used with game.update_rule = 'one_stage': its derivative can be 0",
                value=config.loss,
                hint=f"Use the rule 'simultaneous', or one of the losses {', '.join(known)}",
            )
        layer = coupling_layer(game.discriminator)
        if layer is not None:
            raise ConfigError(
                "game.update_rule",
                f"not exact: the discriminator's layer {layer} couples samples",
                value="one_stage",
                hint="Use 'simultaneous', or a discriminator without batch normalization",
            )

        self.given_up = False
        # [n] of the part that is computed, where the host must not wait to look at it.
        self._unusable: Tensor | None = None
        self.tags = (_UNUSABLE,)
        # Two flags: whether a step had no usable γ, and whether that was acted on.
        self.tensors = {
            name: torch.zeros((), dtype=torch.int64, device=_device(game))
            for name in ("unusable", "given_up")
        }

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Remember that on any worker a sample of this step had no usable γ."""
        self.tensors["unusable"].copy_(self.tensors["unusable"] | (means[_UNUSABLE] > 0))

    def reconsider(self) -> None:
        """Look, and wait, whether steps so far had no usable γ."""
        if int(self.tensors["unusable"]):
            self.tensors["given_up"].fill_(1)
            self.loaded()

    def loaded(self) -> None:
        """Give up if it was given up before; a rollback takes nothing of that back."""
        self.given_up |= bool(self.tensors["given_up"])
        self.tensors["given_up"].fill_(self.given_up)
        if self.given_up:
            self._note()

    def _both(self, batch: Batch) -> Observations:
        self._unusable = None
        observations = super()._both(batch)
        if self._unusable is not None:
            observations[_UNUSABLE] = self._unusable
        return observations

    @property
    def variant(self) -> bool:
        """Whether it has been given up."""
        return self.given_up

    def _note(self) -> None:
        """Say it once."""
        if not self._noted:
            self._noted = True
            self.notes.append(
                "one_stage: the discriminator is so sure of some fakes that their gradients "
                "vanish; such steps are computed as update_rule = 'simultaneous' would"
            )

    def _to_generator(self, batch: Batch, real: Scores, fake: Scores) -> Callable[[Tensor], Tensor]:
        assert self.game.loss.ratio is not None
        ratio = self.game.loss.ratio(real.logits.detach(), fake.logits.detach())  # γ: [n]
        # Beyond this the other factor has left the range of the dtype that computes it.
        limit = torch.finfo(self.game.autocast or ratio.dtype).max ** 0.5
        usable = (ratio.abs() <= limit).all()
        if self.given_up or (devices.is_readable(usable) and not usable):
            self._note()
            return super()._to_generator(batch, real, fake)
        if not devices.is_readable(usable):
            self._unusable = (~usable).to(ratio.dtype).expand(len(ratio))
        factor = ratio.where(usable, torch.nan)
        # One factor a sample, for all its pixels.
        factor = factor.view(-1, *[1] * (fake.samples.dim() - 1))
        return lambda gradient: gradient * factor

    def _penalized(self, batch: Batch, fake: Scores) -> Scores:
        """The fakes cut off from the generator, so that no penalty at fakes is multiplied by γ."""
        leaf = self.game.differentiable(fake.samples, batch.step, "fake")
        if not leaf.requires_grad:
            return Scores(leaf, fake.logits.detach())
        return self.game.judge(leaf, batch, "fake")


def _device(game: Game) -> torch.device:
    parameter = next(game.generator.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
