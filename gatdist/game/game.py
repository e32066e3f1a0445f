"""The game: both networks, their losses and penalties, and the random numbers they are given.

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
from gatdist.config import BOTH, Config, LatentDistribution, PlayerName
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
from gatdist.nn import has_derivatives_of_gpus
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import bare, without_reduction


@dataclass(frozen=True)
class Scores:
    """Samples of one side, and their logits [n]."""

    samples: Tensor
    logits: Tensor


@dataclass(frozen=True)
class RealSide:
    """The real samples' part of a discriminator's phase.

    Attributes:
        scores: of the real samples.
        loss: part of the discriminator's loss, [n], whose gradient is in ``.grad`` already.
        penalties: observations of the penalties at real samples, if theirs is.
    """

    scores: Scores
    loss: Tensor | None = None
    penalties: Observations | None = None


@dataclass(frozen=True)
class Game:
    """Both networks with their losses.

    Attributes:
        generator: in its data-parallel wrapper, as is the discriminator.
        loss: both players' losses.
        latent_size: numbers in one latent.
        latent_distribution: of each of them.
        penalties: with their schedules.
        separate: whether lazy penalties have optimizer steps of their own.
        averages: running means that penalties use.
        augmentation: of all inputs of the discriminator, or None.
        autocast: dtype of the networks' computations, if not that of their parameters.
        step_samples: real samples per step over all workers; 0 if unknown.
        forwards: by player, makes forwards of networks with hidden state pure.
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
    latent_distribution: LatentDistribution = "normal"
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
        """Build the game that ``config`` describes.

        Args:
            config: of the run.
            generator: on its device, as is the discriminator.
            discriminator: likewise.
            sample_shape: of one sample, (C, H, W) or (n,).
            traits: of the networks, from :func:`gatdist.game.contract.examine`.

        Raises:
            ConfigError: a loss, penalty or augmentation is unknown or does not suit the samples.
        """
        device = next(generator.parameters()).device
        scheduled = tuple(
            ScheduledPenalty(name, penalties[name], requested.strength, requested.every_steps)
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
            latent_distribution=config.model.latent_distribution,
            forwards={
                player: Forwards(bare(network), traits[player], config.run.seed)
                for player, network in networks.items()
                if player in traits
            },
        )

    @cached_property
    def _draw_latents(self) -> Latents:
        return Latents(self.seed, self.latent_size, self.step_samples, self.latent_distribution)

    @cached_property
    def adaptive_states(self) -> dict[str, AdaptiveState]:
        found: dict[str, AdaptiveState] = {"averages": self.averages}
        if self.augmentation is not None:
            found["augmentation"] = self.augmentation
        return found

    def without_replication(self) -> Game:
        """Return the game between the bare networks, whose backwards reduce nothing."""
        return replace(self, generator=bare(self.generator), discriminator=bare(self.discriminator))

    def latents(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Draw latents, a function of (seed, stream, position)."""
        return self._draw_latents(batch.positions, _stream(stream, batch), batch.real.dtype)

    def generate(self, latents: Tensor, batch: Batch, generator: nn.Module | None = None) -> Tensor:
        """Generate fakes from ``latents`` and the batch's labels, in the dtype of real samples."""
        network = generator or self.generator
        noise = self._noise(network, "generator", batch)
        with self._forward("generator", "generator", batch), self._computing(latents):
            fakes: Tensor = network(latents, batch.labels, *noise)
        _require_output("generator", fakes, (len(latents), *batch.real.shape[1:]), latents)
        return fakes.to(batch.real.dtype)

    def fakes(self, batch: Batch, stream: str = "latents") -> Tensor:
        """Generate fakes without a graph, for a phase that does not train the generator."""
        with torch.no_grad():
            return self.generate(self.latents(batch, stream), batch, bare(self.generator))

    def discriminate(
        self, samples: Tensor, batch: Batch, side: str, discriminator: nn.Module | None = None
    ) -> Scores:
        """Return the discriminator's logits of augmented samples, in the samples' dtype.

        ``side`` names the random stream of the augmentation.
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

    def backward_real(self, batch: Batch) -> RealSide:
        """Score the real samples, and backpropagate at once what does not depend on the fakes.

        These are penalties at the real samples, and their part of the loss where nothing couples
        it to the fakes. Then the graphs of the two sides are never held at the same time.
        """
        loss = self.loss.discriminator
        coupled = not isinstance(loss, Sum) or bool(self.due(batch.step, "logits"))
        samples = self.differentiable(batch.real, batch.step, "real")
        if coupled and not has_derivatives_of_gpus(samples):
            # torch's activations have second derivatives of zero, which would take a backward
            # through the network that the coupled loss shares if penalties wait for it.
            return RealSide(self.discriminate(samples, batch, "real"))
        with without_reduction(self.discriminator):  # the backward of the fakes sends all
            scores = self.discriminate(samples, batch, "real")
            total, observations = self._penalties(batch, "real", samples, scores.logits)
            if isinstance(loss, Sum) and not coupled:
                real_loss = loss.real(scores.logits)
                total = real_loss if total is None else real_loss + total
            if total is not None:
                torch.autograd.backward(batch.mean(total), retain_graph=coupled)
        if coupled:
            return RealSide(scores, penalties=observations)
        return RealSide(
            Scores(batch.real, scores.logits.detach()), real_loss.detach(), observations
        )

    def due(self, step: int, at: Side) -> list[ScheduledPenalty]:
        """Return the penalties at one side that are part of this step's losses."""
        return [
            p for p in self.penalties if p.penalty.at == at and p.due(step) and not self.apart(p)
        ]

    def apart(self, penalty: ScheduledPenalty) -> bool:
        """Return whether a penalty has optimizer steps of its own."""
        return self.separate and penalty.every_steps > 1

    def differentiable(self, samples: Tensor, step: int, at: Side) -> Tensor:
        """Return ``samples`` as a leaf, with gradients if a penalty of this step needs them."""
        return samples.detach().requires_grad_(bool(self.due(step, at)))

    def discriminator_loss(
        self, batch: Batch, real_side: RealSide, fake: Scores, penalized: Scores
    ) -> tuple[Tensor, Observations]:
        """Return the discriminator's weighted mean loss with its penalties, and what to report.

        Args:
            batch: of this phase.
            real_side: what is backpropagated already is omitted.
            fake: scores of the fakes.
            penalized: scores of the fakes, as a leaf of the graph that penalties differentiate.
        """
        loss, real = self.loss.discriminator, real_side.scores
        if isinstance(loss, Sum) and real_side.loss is not None:
            total = real_side.loss + loss.fake(fake.logits)
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
            "fake": (penalized.samples, penalized.logits),
            "logits": (real.logits, fake.logits),
        }
        if real_side.penalties is None:
            sides["real"] = (real.samples, real.logits)
        else:
            observations |= real_side.penalties
        if self.due(batch.step, "between"):
            between = self.between(batch, real.samples, fake.samples)
            sides["between"] = (between.samples, between.logits)
        for at, (inputs, scalars) in sides.items():
            value, observed = self._penalties(batch, at, inputs, scalars)
            observations |= observed
            total = total if value is None else total + value
        return batch.mean(total), observations

    def _penalties(
        self, batch: Batch, at: Side, inputs: Tensor, scalars: Tensor
    ) -> tuple[Tensor | None, Observations]:
        """Return the sum of the penalties at one side that are due, [n], if there are any."""
        total: Tensor | None = None
        observations = Observations()
        for scheduled in self.due(batch.step, at):
            value, observed = self._penalty(scheduled, inputs, scalars, batch)
            observations |= observed
            total = value if total is None else total + value
        return total, observations

    def generator_penalties(self, batch: Batch) -> tuple[list[Tensor], Observations]:
        """Return the weighted mean of the generator's penalties that are due, if there are any."""
        due = self.due(batch.step, "latents")
        return self._at_latents(batch, due) if due else ([], {})

    def penalty_loss(
        self, batch: Batch, due: list[ScheduledPenalty]
    ) -> tuple[Tensor, Observations]:
        """Return the weighted mean of some penalties of one player, on a graph of their own."""
        total, observations = batch.real.new_zeros(()), Observations()
        for scheduled in due:
            at = scheduled.penalty.at
            if at == "latents":
                (value,), observed = self._at_latents(batch, [scheduled])
            else:
                inputs, scalars = self._side(batch, at)
                value, observed = self._penalty(scheduled, inputs, scalars, batch)
                # A penalty of gradients does not depend on biases. The term gives them the gradient
                # 0, which the data-parallel reduction waits for.
                value = batch.mean(value + 0 * scalars)
            observations |= observed
            total = total + value
        return total, observations

    def between(self, batch: Batch, real: Tensor, fake: Tensor) -> Scores:
        """Score points between real and fake samples, each at a random place of its own."""
        share = draws.uniform(
            self.seed, _stream("between", batch), batch.positions, dtype=real.dtype
        ).view(-1, *[1] * (real.dim() - 1))
        points = (share * real + (1 - share) * fake).detach().requires_grad_()
        return self.discriminate(points, batch, "between")

    def _side(self, batch: Batch, at: Side) -> tuple[Tensor, Tensor]:
        """Compute what a penalty is a function of, for it alone."""

        def scores(samples: Tensor, side: str) -> Scores:
            return self.discriminate(samples.detach().requires_grad_(at != "logits"), batch, side)

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
        styles_of = getattr(bare(self.generator), "styles", None)
        with _outputs(styles_of if isinstance(styles_of, nn.Module) else None) as styles:
            fakes = self.generate(latents, batch)
        start = styles[0] if styles else latents
        if not isinstance(start, Tensor) or len(start) != len(latents):
            found = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            rule = f"its module 'styles' must return a tensor [n, layers, s]; found {found}"
            raise ConfigError("model.generator.name", rule)
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
            value, observed = self._penalty(scheduled, start, scalars, batch)
            observations |= observed
            total = total + value
        return [batch.mean(total + 0 * scalars)], observations

    def _penalty(
        self, scheduled: ScheduledPenalty, inputs: Tensor, scalars: Tensor, batch: Batch
    ) -> tuple[Tensor, Observations]:
        now = scheduled.strength.at(batch.step * self.step_samples)
        strength = batch.strengths.get(scheduled.name, now)
        value = scheduled(inputs, scalars, self.averages, strength)
        reported = {f"penalty/{scheduled.name}": value.detach() / scheduled.every_steps}
        return value, reported | scheduled.penalty.observe(inputs, scalars)

    def _noise(self, network: nn.Module, name: str, batch: Batch) -> tuple[Tensor, ...]:
        stream = _stream(name, batch)
        return draws.of_network(network, self.seed, stream, batch.positions, batch.real.dtype)

    def _forward(self, player: PlayerName, name: str, batch: Batch) -> AbstractContextManager[None]:
        forwards = self.forwards.get(player)
        if forwards is None:
            return nullcontext()
        return forwards.at(_stream(f"{player}/{name}", batch), batch)

    def _computing(self, like: Tensor) -> AbstractContextManager[object]:
        # Around each call of a network, not around more: autocast caches weights that it has cast.
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(like.device.type, self.autocast)


def _require_output(player: PlayerName, out: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse what is no floating-point tensor of this shape on the device of ``like``."""
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
def _outputs(module: nn.Module | None) -> Iterator[list[object]]:
    """Collect a module's outputs."""
    given: list[object] = []
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
    """Yield the bare network with parameters that collect no gradient."""
    network = bare(module)
    trainable = [p for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
