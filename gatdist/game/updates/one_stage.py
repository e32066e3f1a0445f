"""The one-stage step: the simultaneous gradients from one forward and one backward.

Shen et al. 2021, "Training Generative Adversarial Networks in One Stage".
With one logit ℓ per sample and no coupling between samples, the generator's gradient with respect
to a fake is the discriminator's times γ = g′(ℓ)/d′(ℓ). So the discriminator's loss is
backpropagated once, and each sample's gradient is multiplied by its γ where it enters the
generator. The single backward overlaps communication of the discriminator's gradients with
computation of the generator's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.config import GameConfig
from gatdist.game.exactness import coupling_layer
from gatdist.game.game import Game
from gatdist.game.losses import losses
from gatdist.game.penalties import Observations
from gatdist.game.scores import Scores
from gatdist.game.updates.rule import register_update_rule, require_adversarial_only
from gatdist.game.updates.simultaneous import Hook, Simultaneous
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch

_UNUSABLE = "one_stage/unusable"


@register_update_rule("one_stage")
class OneStage(Simultaneous):
    """(θ, ψ) ← (θ − η ∇_θ L_G(θ, ψ), ψ − η ∇_ψ L_D(θ, ψ)), as ``simultaneous``.

    Where the discriminator's gradient underflows (d′ ≈ 0), γ is unusable, and that part of the
    batch is computed as ``simultaneous`` does. On CUDA, where reading γ would make the host wait,
    such a step is non-finite and skipped, and after the log interval all steps are those of
    ``simultaneous`` (:meth:`reconsider`).

    Raises:
        ConfigError: the loss has no ratio γ, the generator has other losses, or the discriminator
            returns several logits per sample or couples the samples of a batch.
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
        require_adversarial_only(game, "one_stage")
        layer = coupling_layer(game.discriminator)
        if layer is not None:
            raise ConfigError(
                "game.update_rule",
                f"not exact: the discriminator's layer {layer} couples samples",
                value="one_stage",
                hint="Use 'simultaneous', or a discriminator without batch normalization",
            )

        self.given_up = False
        # [n] of the present part, where reading it would make the host wait.
        self._unusable: Tensor | None = None
        self.tags = (_UNUSABLE,)
        # Flags: whether γ was unusable in a step, and whether that has been acted on.
        self.tensors = {
            name: torch.zeros((), dtype=torch.int64, device=_device(game))
            for name in ("unusable", "given_up")
        }

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        self.tensors["unusable"].copy_(self.tensors["unusable"] | (means[_UNUSABLE] > 0))

    def reconsider(self) -> None:
        if int(self.tensors["unusable"]):
            self.tensors["given_up"].fill_(1)
            self.loaded()

    def loaded(self) -> None:
        # A rollback does not undo the decision.
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
        return self.given_up

    def _note(self) -> None:
        if not self._noted:
            self._noted = True
            self.notes.append(
                "one_stage: the discriminator's gradient underflows at some fakes; such steps are "
                "computed as with game.update_rule = 'simultaneous'"
            )

    def _to_generator(
        self, batch: Batch, real: Scores, fake: Scores, fakes: Mapping[str, Tensor]
    ) -> tuple[dict[str, Hook], Observations]:
        assert self.game.loss.ratio is not None
        if len(fake.maps) > 1 or fake.maps[0].dim() > 1:
            shapes = ", ".join(str(list(logits.shape[1:])) for logits in fake.maps)
            raise ConfigError(
                "game.update_rule",
                f"needs one logit per sample; the discriminator returns maps of {shapes}",
                value="one_stage",
                hint="Use 'simultaneous', or a discriminator that returns logits [n]",
            )
        ratio = self.game.loss.ratio(real.logits.detach(), fake.logits.detach())  # γ: [n]
        # Beyond this the other factor has left the range of the dtype that computes it.
        limit = torch.finfo(self.game.autocast or ratio.dtype).max ** 0.5
        usable = (ratio.abs() <= limit).all()
        if self.given_up or (draws.is_readable(usable) and not usable):
            self._note()
            return super()._to_generator(batch, real, fake, fakes)
        if not draws.is_readable(usable):
            self._unusable = (~usable).to(ratio.dtype).expand(len(ratio))
        factor = ratio.where(usable, torch.nan)
        with torch.no_grad():
            loss = self.game.loss.generator(real.logits, fake.logits)
        return dict.fromkeys(fakes, _scaled(factor)), {"loss/generator": loss}

    def _penalized(self, batch: Batch, fake: Scores) -> Scores:
        # Detached from the generator, so that no penalty at fakes is multiplied by γ.
        leaf = self.game.differentiable(fake.samples, batch.step, "fake")
        if not leaf.requires_grad:
            return Scores(leaf, fake.detach().maps)
        return self.game.discriminate(leaf, batch, "fake")


def _scaled(factor: Tensor) -> Hook:
    return lambda gradient: gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


def _device(game: Game) -> torch.device:
    parameter = next(game.generator.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
