"""The game: who plays, for what, with which penalties and from which noise.

Update rules decide how.

Shapes: n local samples; samples [n, C, H, W] or [n, d]; latents [n, latent_size]; logits [n].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.config import BOTH, Config, PlayerName
from gatdist.game.adaptive_state import AdaptiveState, Averages
from gatdist.game.augmentation import Augmentation, build_augmentation
from gatdist.game.hidden import Forwards, Traits
from gatdist.game.latents import Latents
from gatdist.game.losses import Loss, Sum, losses
from gatdist.game.penalties import (
    Observations,
    ScheduledPenalty,
    Side,
    penalties,
    projections,
)
from gatdist.models import COMPUTE_DTYPES
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import bare, without_reduction


@dataclass(frozen=True)
class Scores:
    """What the discriminator said of one side: samples, and their logits [n].

    Attributes:
        half: the side's half of the discriminator's loss, [n], if it is backpropagated already.
    """

    samples: Tensor
    logits: Tensor
    half: Tensor | None = None


@dataclass(frozen=True)
class Game:
    """Both networks and what they play for.

    Attributes:
        generator: called where its parameters are to get (reduced) gradients.
        discriminator: likewise.
        loss: both players' losses.
        seed: of the run.
        latent_size: numbers in one latent.
        penalties: with their schedules.
        separate: whether penalties that are not due at every step stay out of the players' losses.
        averages: what penalties remember.
        augmentation: of all that the discriminator sees; None for nothing.
        autocast: what the networks compute in, if not in the dtype of their parameters.
        step_samples: real samples that a step shows, globally; 0 if nobody knows.
        forwards: by player, what makes forwards pure of networks that have hidden state.
    """

    generator: nn.Module
    discriminator: nn.Module
    loss: Loss
    seed: int
    latent_size: int
    penalties: tuple[ScheduledPenalty, ...] = ()
    separate: bool = False
    averages: Averages = field(default_factory=lambda: Averages({}))
    augmentation: Augmentation | None = None
    autocast: torch.dtype | None = None
    step_samples: int = 0
    forwards: Mapping[PlayerName, Forwards] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls,
        config: Config,
        generator: nn.Module,
        discriminator: nn.Module,
        sample_shape: tuple[int, ...],
        traits: Mapping[PlayerName, Traits] = MappingProxyType({}),
    ) -> Game:
        """The game that ``config`` describes.

        Args:
            config: of the run.
            generator: on its device.
            discriminator: likewise.
            sample_shape: of one sample, (C, H, W) or (n,).
            traits: of the networks, from :func:`gatdist.game.contract.examine`.

        Raises:
            ConfigError: an unknown loss, penalty or augmentation, or one that does not suit the
                samples.
        """
        device = next(generator.parameters()).device
        scheduled = tuple(
            ScheduledPenalty(
                name,
                penalties[name],
                requested.strength,
                requested.every_steps,
                requested.final_strength,
                requested.change_samples / config.step_samples,
            )
            for name, requested in sorted(config.game.penalties.items())
        )
        networks = dict(zip(BOTH, (generator, discriminator), strict=True))
        decays = {tag: d for p in scheduled for tag, d in p.penalty.averages.items()}
        return cls(
            generator=generator,
            discriminator=discriminator,
            loss=losses[config.game.loss],
            seed=config.run.seed,
            latent_size=config.model.latent_size,
            penalties=scheduled,
            separate=config.game.lazy_penalties == "separate",
            averages=Averages(decays, device),
            augmentation=build_augmentation(config, sample_shape, device),
            autocast=COMPUTE_DTYPES.get(config.precision.dtype),
            step_samples=config.step_samples,
            forwards={
                player: Forwards(bare(network), traits[player], config.run.seed)
                for player, network in networks.items()
                if player in traits
            },
        )

    @cached_property
    def _draw_latents(self) -> Latents:
        return Latents(self.seed, self.latent_size, self.step_samples)

    @cached_property
    def adaptive_states(self) -> dict[str, AdaptiveState]:
        """All that is adaptive, by name."""
        found: dict[str, AdaptiveState] = {"averages": self.averages}
        if self.augmentation is not None:
            found["augmentation"] = self.augmentation
        return found

    def without_replication(self) -> Game:
        """The same game between the networks themselves: no backward is reduced over workers."""
        return replace(self, generator=bare(self.generator), discriminator=bare(self.discriminator))

    def latents(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Standard normal [n, latent_size], a function of (seed, stream, position)."""
        return self._draw_latents(batch.positions, _stream(stream, batch), batch.real.dtype)

    def generate(self, latents: Tensor, batch: Batch, generator: nn.Module | None = None) -> Tensor:
        """Fakes from ``latents``, with the batch's labels, in the dtype of the real samples.

        ``generator``: what to call; by default the one whose gradients are reduced.
        """
        network = generator or self.generator
        noise = self._noise(network, "generator", batch)
        with self._forward("generator", "generator", batch), self._computing(latents):
            fakes: Tensor = network(latents, batch.labels, *noise)
        _require_output("generator", fakes, (len(latents), *batch.real.shape[1:]), latents)
        return fakes.to(batch.real.dtype)

    def fakes(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Fakes without a graph, for a phase in which the generator stands still."""
        with torch.no_grad():
            return self.generate(self.latents(batch, stream), batch, bare(self.generator))

    def judge(
        self, samples: Tensor, batch: Batch, side: str, discriminator: nn.Module | None = None
    ) -> Scores:
        """The discriminator's logits of (augmented) samples, in the samples' dtype.

        Args:
            samples: [n, ...], a sample for each position of the batch.
            batch: gives labels, and positions to key the augmentation by.
            side: names the augmentation's draws.
            discriminator: what to call; by default the one whose gradients are reduced.
        """
        shown = samples
        if self.augmentation is not None:
            stream = _stream(f"augmentation/{side}", batch)
            shown = self.augmentation(samples, self.seed, stream, batch.positions)
        network = discriminator or self.discriminator
        noise = self._noise(network, f"discriminator/{side}", batch)
        with self._forward("discriminator", side, batch), self._computing(samples):
            logits: Tensor = network(shown, batch.labels, *noise)
        _require_output("discriminator", logits, (len(samples),), samples)
        return Scores(samples, logits.to(samples.dtype))

    def judge_real(self, batch: Batch) -> Scores:
        """The discriminator's logits of the real samples, for :meth:`discriminator_loss`.

        Where nothing couples their part of the loss to the fakes', it is backpropagated at once: so
        what the two backwards need of activations is never held at the same time.
        """
        loss = self.loss.discriminator
        if (
            not isinstance(loss, Sum)
            or self.due(batch.step, "real")
            or self.due(batch.step, "logits")
        ):
            return self.judge(self.differentiable(batch.real, batch.step, "real"), batch, "real")
        with without_reduction(self.discriminator):  # the backward of the fakes sends both
            logits = self.judge(batch.real, batch, "real").logits
            half = loss.real(logits)
            torch.autograd.backward(batch.mean(half))
        return Scores(batch.real, logits.detach(), half.detach())

    def due(self, step: int, at: Side) -> list[ScheduledPenalty]:
        """The penalties at one side that this step's losses contain."""
        return [
            p for p in self.penalties if p.penalty.at == at and p.due(step) and not self.apart(p)
        ]

    def apart(self, penalty: ScheduledPenalty) -> bool:
        """Whether a penalty has steps of its own."""
        return self.separate and penalty.every_steps > 1

    def differentiable(self, samples: Tensor, step: int, at: Side) -> Tensor:
        """``samples`` as a leaf that collects gradients if a penalty of this step needs them."""
        return samples.detach().requires_grad_(bool(self.due(step, at)))

    def discriminator_loss(
        self, batch: Batch, real: Scores, fake: Scores, penalized: Scores
    ) -> tuple[Tensor, Observations]:
        """The discriminator's weighted mean loss with the penalties due, and what to report.

        Args:
            batch: this step's.
            real: the real side.
            fake: the fake side.
            penalized: the fake side as the penalties at fakes are to see it: a leaf of its own
                graph.
        """
        loss = self.loss.discriminator
        if isinstance(loss, Sum) and real.half is not None:
            total = real.half + loss.fake(fake.logits)
        else:
            total = loss(real.logits, fake.logits)
        observations = {
            "loss/discriminator": total.detach(),
            "logits/real": real.logits.detach(),
            "logits/fake": fake.logits.detach(),
            "logits/pairwise_accuracy": (real.logits > fake.logits).to(total.dtype),
        }
        if self.augmentation is not None:
            observations |= self.augmentation.observe(real.logits.detach())
        sides: dict[Side, tuple[Tensor, Tensor]] = {
            "real": (real.samples, real.logits),
            "fake": (penalized.samples, penalized.logits),
            "logits": (real.logits, fake.logits),
        }
        if self.due(batch.step, "between"):
            between = self.between(batch, real.samples, fake.samples)
            sides["between"] = (between.samples, between.logits)
        for at, (inputs, scalars) in sides.items():
            for scheduled in self.due(batch.step, at):
                value, seen = self._penalty(scheduled, inputs, scalars, batch)
                observations |= seen
                total = total + value
        return batch.mean(total), observations

    def generator_penalties(self, batch: Batch) -> tuple[list[Tensor], Observations]:
        """The weighted means of the generator's penalties that are due: none, or one tensor."""
        due = self.due(batch.step, "latents")
        return self._at_latents(batch, due) if due else ([], {})

    def penalty_loss(
        self, batch: Batch, due: list[ScheduledPenalty]
    ) -> tuple[Tensor, Observations]:
        """The weighted mean of some penalties of one player, on graphs of their own."""
        total, observations = batch.real.new_zeros(()), Observations()
        for scheduled in due:
            at = scheduled.penalty.at
            if at == "latents":
                (value,), seen = self._at_latents(batch, [scheduled])
            else:
                inputs, scalars = self._side(batch, at)
                value, seen = self._penalty(scheduled, inputs, scalars, batch)
                # Biases do not move a gradient. With a part in the sum, if none in its value, they
                # get the gradient 0 that the data-parallel reduction waits for.
                value = batch.mean(value + 0 * scalars)
            observations |= seen
            total = total + value
        return total, observations

    def between(self, batch: Batch, real: Tensor, fake: Tensor) -> Scores:
        """Points between real and fake samples, each at a place of its own, and their logits."""
        share = draws.uniform(
            self.seed, _stream("between", batch), batch.positions, dtype=real.dtype
        ).view(-1, *[1] * (real.dim() - 1))
        points = (share * real + (1 - share) * fake).detach().requires_grad_()
        return self.judge(points, batch, "between")

    def _side(self, batch: Batch, at: Side) -> tuple[Tensor, Tensor]:
        """What a penalty is a function of, computed for it alone."""

        def scores(samples: Tensor, side: str) -> Scores:
            return self.judge(samples.detach().requires_grad_(at != "logits"), batch, side)

        if at == "real":
            side = scores(batch.real, "real")
        elif at == "fake":
            side = scores(self.fakes(batch), "fake")
        elif at == "between":
            side = self.between(batch, batch.real, self.fakes(batch))
        else:
            real, fake = scores(batch.real, "real"), scores(self.fakes(batch), "fake")
            return real.logits, fake.logits
        return side.samples, side.logits

    def _at_latents(
        self, batch: Batch, due: list[ScheduledPenalty]
    ) -> tuple[list[Tensor], Observations]:
        latents = self.latents(batch).detach().requires_grad_()
        with _outputs(getattr(bare(self.generator), "mapping", None)) as styles:
            fakes = self.generate(latents, batch)
        start = styles[0] if styles else latents
        noise = draws.normal(
            self.seed,
            _stream("projections", batch),
            batch.positions,
            fakes.shape[1:],
            fakes.dtype,
        )
        scalars = projections(fakes, noise)
        total, observations = torch.zeros_like(scalars), Observations()
        for scheduled in due:
            value, seen = self._penalty(scheduled, start, scalars, batch)
            observations |= seen
            total = total + value
        return [batch.mean(total + 0 * scalars)], observations

    def _penalty(
        self, scheduled: ScheduledPenalty, inputs: Tensor, scalars: Tensor, batch: Batch
    ) -> tuple[Tensor, Observations]:
        strength = batch.strengths.get(scheduled.name, scheduled.strength_at(batch.step))
        value = scheduled(inputs, scalars, self.averages, strength)
        reported = {f"penalty/{scheduled.name}": value.detach() / scheduled.every_steps}
        return value, reported | scheduled.penalty.observe(inputs, scalars)

    def _noise(self, network: nn.Module, name: str, batch: Batch) -> tuple[Tensor, ...]:
        stream = _stream(name, batch)
        return draws.of_network(network, self.seed, stream, batch.positions, batch.real.dtype)

    def _forward(self, player: PlayerName, name: str, batch: Batch) -> AbstractContextManager[None]:
        """Around each call of a network: see :mod:`gatdist.game.hidden`."""
        forwards = self.forwards.get(player)
        if forwards is None:
            return nullcontext()
        return forwards.at(_stream(f"{player}/{name}", batch), batch)

    def _computing(self, like: Tensor) -> AbstractContextManager[object]:
        """Around each call of a network. Not around more: autocast keeps weights it has cast."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(like.device.type, self.autocast)


def _require_output(player: PlayerName, out: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse what is no floating-point tensor of this shape beside ``like``, on each call."""
    if isinstance(out, Tensor) and out.shape == shape and out.is_floating_point():
        if out.device == like.device and out.layout == torch.strided:
            return
        found = f"{out.layout} on {out.device}"
    elif isinstance(out, Tensor):
        found = f"{out.dtype} {tuple(out.shape)}"
    else:
        found = type(out).__name__
    what = "samples" if player == "generator" else "one logit per sample"
    raise ConfigError(
        f"model.{player}.name",
        f"must return {what}, a floating-point tensor {shape} on {like.device}; found {found}",
    )


def _stream(name: str, batch: Batch) -> str:
    return f"{name}#{batch.noise}" if batch.noise else name


@contextmanager
def _outputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a module gives meanwhile, call by call."""
    given: list[Tensor] = []
    if module is None:
        yield given
        return
    handle = module.register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        yield given
    finally:
        handle.remove()


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
