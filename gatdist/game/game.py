"""The game: who plays, for what, with which penalties and from which noise.

Update rules decide how.

Shapes: n local samples; samples [n, C, H, W] or [n, d]; latents [n, latent_size]; logits [n].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatdist.config import Config
from gatdist.errors import ConfigError
from gatdist.game.losses import Loss, losses
from gatdist.game.penalties import ScheduledPenalty, penalties
from gatdist.parallel import draws
from gatdist.parallel.communicator import bare

Observations = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One worker's share of the global batch.

    Attributes:
        real: samples as the networks see them.
        labels: int64 [n], or None for unlabelled data.
        positions: int64 [n], each sample's position in the run: the key of every random draw.
        step: index of the step, a function of the clock.
    """

    real: Tensor
    labels: Tensor | None
    positions: Tensor
    step: int


@dataclass(frozen=True)
class Judged:
    """What the discriminator said of one side: samples, and their logits [n]."""

    samples: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Game:
    """Both networks and what they play for.

    Attributes:
        generator: called where its parameters are to get (reduced) gradients.
        discriminator: likewise.
        loss: both players' losses.
        seed: of the run.
        latent_size: numbers in one latent.
        penalties: on the discriminator, with their schedules.
    """

    generator: nn.Module
    discriminator: nn.Module
    loss: Loss
    seed: int
    latent_size: int
    penalties: tuple[ScheduledPenalty, ...] = field(default=())

    @classmethod
    def from_config(cls, config: Config, generator: nn.Module, discriminator: nn.Module) -> Game:
        """The game that ``config`` describes. Raises ConfigError for an unknown loss or penalty."""
        return cls(
            generator=generator,
            discriminator=discriminator,
            loss=losses[config.game.loss],
            seed=config.run.seed,
            latent_size=config.model.latent_size,
            penalties=tuple(
                ScheduledPenalty(name, penalties[name], scheduled.strength, scheduled.every_steps)
                for name, scheduled in sorted(config.game.penalties.items())
            ),
        )

    def latents(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Standard normal [n, latent_size], a function of (seed, stream, position)."""
        return draws.normal(
            self.seed, stream, batch.positions, (self.latent_size,), batch.real.dtype
        )

    def fakes(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Fakes without a graph, for a phase in which the generator stands still."""
        with torch.no_grad():
            fakes: Tensor = bare(self.generator)(self.latents(batch, stream), batch.labels)
        return fakes

    def judge(self, samples: Tensor, labels: Tensor | None) -> Judged:
        """The discriminator's logits, its gradients to be reduced over the workers."""
        logits: Tensor = self.discriminator(samples, labels)
        if logits.shape != (len(samples),):
            raise ConfigError(
                "model.discriminator.name",
                f"must give one logit a sample; {len(samples)} samples gave {tuple(logits.shape)}",
            )
        return Judged(samples, logits)

    def due(self, step: int, at: str) -> list[ScheduledPenalty]:
        """The penalties of one side (``real`` or ``fake``) that this step evaluates."""
        return [p for p in self.penalties if p.penalty.at == at and step % p.every_steps == 0]

    def differentiable(self, samples: Tensor, step: int, at: str) -> Tensor:
        """``samples`` as a leaf that collects gradients if a penalty of this step needs them."""
        return samples.detach().requires_grad_(bool(self.due(step, at)))

    def discriminator_loss(
        self, batch: Batch, real: Judged, fake: Judged, penalized: Judged
    ) -> tuple[Tensor, Observations]:
        """The discriminator's mean loss with the penalties due, and what to report.

        Args:
            batch: this step's.
            real: the real side.
            fake: the fake side.
            penalized: the fake side as the penalties at fakes are to see it: a leaf of its own
                graph.
        """
        total = self.loss.discriminator(real.logits, fake.logits)
        observations = {
            "loss/discriminator": total.detach(),
            "logits/real": real.logits.detach(),
            "logits/fake": fake.logits.detach(),
            "logits/pairs_ranked_rightly": (real.logits > fake.logits).to(total.dtype),
        }
        for side, at in ((real, "real"), (penalized, "fake")):
            for scheduled in self.due(batch.step, at):
                value = scheduled(side.samples, side.logits)
                observations[f"penalty/{scheduled.name}"] = value.detach() / scheduled.every_steps
                total = total + value
        return total.mean(), observations


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The bare network as a function of its inputs alone: its parameters collect no gradient."""
    network = bare(module)
    trainable = [p for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
