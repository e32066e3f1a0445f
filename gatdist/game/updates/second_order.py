"""Common parts of rules that differentiate gradients.

They call the bare networks: ``autograd.grad`` bypasses the data-parallel reduction, so the rule
itself averages every gradient and product over all parts of all workers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gatdist.config import BOTH, GameConfig, PlayerName
from gatdist.game.game import Game, RealSide
from gatdist.game.penalties import Observations
from gatdist.game.scores import mean_over_maps
from gatdist.game.updates.rule import ReducedPhase, Step, UpdateRule, trainable
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import Reduction

T = TypeVar("T")
Vector = list[Tensor]
Gradients = Mapping[PlayerName, Vector]


@dataclass(frozen=True)
class Losses:
    """Both players' weighted mean losses at one part, on one graph.

    Attributes:
        generator: L_G with its penalties.
        discriminator: L_D with its penalties.
        value: L_D without penalties: what a zero-sum game is about.
        observations: what to report.
    """

    generator: Tensor
    discriminator: Tensor
    value: Tensor
    observations: Observations


class SecondOrder(UpdateRule):
    """A rule with one phase for both players, computed from reduced gradients and products."""

    second_order = True

    def __init__(self, game: Game, config: GameConfig) -> None:
        super().__init__(game, config)
        self._bare = game.without_replication()
        self.theta = trainable(self._bare.generator)
        self.psi = trainable(self._bare.discriminator)

    def phases(self, step: Step) -> Iterator[ReducedPhase]:
        def backward(batch: Batch) -> Observations:  # to estimate a part's cost
            losses = self.losses(batch)
            torch.autograd.backward([losses.generator, losses.discriminator])
            return losses.observations

        def compute(
            reduction: Reduction, parts: Sequence[Batch]
        ) -> tuple[Gradients, list[Observations]]:
            return self.compute(step, reduction, parts)

        yield ReducedPhase("both", BOTH, step.batch, backward, is_last=True, compute=compute)

    @abstractmethod
    def compute(
        self, step: Step, reduction: Reduction, parts: Sequence[Batch]
    ) -> tuple[Gradients, list[Observations]]:
        """Return both players' reduced gradients, and each part's observations."""

    def require_second_derivatives(self, batch: Batch) -> None:
        """Raise RuntimeError if a layer has none. Leaves something in ``.grad``."""
        losses = self.losses(batch)
        field = gradient(losses.generator, self.theta, graph=True)
        field += gradient(losses.discriminator, self.psi, graph=True)
        # A backward visits every layer; ``autograd.grad`` would skip those without derivatives.
        torch.autograd.backward(dot(field, field))

    def losses(self, batch: Batch) -> Losses:
        """Return both losses as functions of both players' parameters."""
        game = self._bare
        fakes = game.generate(batch)
        shown = game.differentiable(game.shown(batch), batch.step, "real")
        real = game.discriminate(shown, batch, "real")
        fake = game.discriminate(game.shown(batch, fakes), batch, "fake")
        loss, observations = game.discriminator_loss(batch, RealSide(real), fake, penalized=fake)
        generator_loss, of_terms = game.generator_loss(batch, fakes, fake, real)
        penalties, of_generator = game.generator_penalties(batch)
        total = sum(penalties, batch.mean(generator_loss))
        value = batch.mean(mean_over_maps(game.loss.discriminator, real, fake))
        observations |= of_generator | of_terms | {"loss/generator": generator_loss.detach()}
        return Losses(total, loss, value, observations)


class OfLastPart(Generic[T]):
    """Cache of the result for the last part, so that a single part is computed once.

    It is freed before the next result, so no two parts' graphs are in memory together.
    """

    def __init__(self, make: Callable[[Batch], T]) -> None:
        self._make = make
        self._kept: tuple[Batch, T] | None = None

    def __call__(self, part: Batch) -> T:
        if self._kept is None or self._kept[0] is not part:
            self._kept = None
            self._kept = part, self._make(part)
        return self._kept[1]


def gradient(
    loss: Tensor, parameters: Vector, *, graph: bool = False, keep: bool = False
) -> Vector:
    """Return ∂loss/∂parameters, zeros where there is no dependence.

    ``graph`` makes the result differentiable; ``keep`` retains the loss's graph.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(
        torch.autograd.grad(
            loss,
            parameters,
            create_graph=graph,
            retain_graph=graph or keep,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def dot(a: Vector, b: Vector) -> Tensor:
    """Return ⟨a, b⟩, a scalar."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
