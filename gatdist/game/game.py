"""The game: both networks, their losses and penalties, and the random numbers they are given.

Shapes: n local samples; samples [n, C, H, W] or [n, d]; latents [n, latent_size]; logits [n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.common.errors import ConfigError
from gatdist.config import BOTH, Config, LatentDistribution, PlayerName, Schedule
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
from gatdist.game.scores import Scores, mean_over_maps, parse
from gatdist.game.tasks import Draws, Fields, Generation, Record, Task
from gatdist.game.terms import Context, WeightedTerm, build_terms
from gatdist.models import COMPUTE_DTYPES
from gatdist.nn import has_derivatives_of_gpus
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import bare, without_reduction


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
        task: what the generator receives, and what the discriminator sees.
        terms: of the generator's loss, with their weights.
        adversarial_weight: of the adversarial loss in the generator's loss.
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
    task: Task = field(default_factory=Generation)
    terms: tuple[WeightedTerm, ...] = ()
    adversarial_weight: Schedule = field(default_factory=lambda: Schedule.constant(1.0))

    @classmethod
    def from_config(
        cls,
        config: Config,
        generator: nn.Module,
        discriminator: nn.Module,
        sample_shape: tuple[int, ...],
        traits: Mapping[PlayerName, Traits] = MappingProxyType({}),
        task: Task | None = None,
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Game:
        """Build the game that ``config`` describes.

        Args:
            config: of the run.
            generator: on its device, as is the discriminator.
            discriminator: likewise.
            sample_shape: of what the discriminator sees of one sample, (C, H, W) or (n,).
            traits: of the networks, from :func:`gatdist.game.contract.examine`.
            task: of the run; None: generation.
            metadata: of the samples.

        Raises:
            ConfigError: a loss, penalty or augmentation is unknown or does not suit the samples.
        """
        device = next(generator.parameters()).device
        task = task or Generation()
        scheduled = tuple(
            ScheduledPenalty(name, penalties[name], requested.strength, requested.every_steps)
            for name, requested in sorted(config.game.penalties.items())
        )
        if config.game.ema_batch_norm == "recomputed" and task.has_inputs:
            rule = f"generates from latents alone, unlike the task {config.game.task.name!r}"
            hint = "Use 'averaged' or 'live'"
            raise ConfigError("game.ema_batch_norm", rule, value="recomputed", hint=hint)
        for each in scheduled:
            if each.penalty.at == "latents" and not task.takes_latents:
                rule = f"needs latents, which the task {config.game.task.name!r} does not use"
                raise ConfigError(f"game.penalties.{each.name}", rule, hint="Leave it out")
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
            task=task,
            terms=build_terms(config, task.target, metadata),
            adversarial_weight=config.game.adversarial_weight,
        )

    @cached_property
    def _draw_latents(self) -> Latents:
        return Latents(self.seed, self.latent_size, self.step_samples, self.latent_distribution)

    @cached_property
    def schedules(self) -> dict[str, Callable[[int], float]]:
        """Functions of ``samples_seen`` that change in the run, by their names in a batch."""
        found: dict[str, Callable[[int], float]] = {
            f"penalty/{p.name}": p.strength.at for p in self.penalties if not p.strength.is_constant
        }
        for weighted in self.terms:
            if weighted.start_samples or not weighted.weight.is_constant:
                found[f"term/{weighted.name}"] = weighted.weight_at
        if not self.adversarial_weight.is_constant:
            found["adversarial"] = self.adversarial_weight.at
        return found

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

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with the fields that the task computes, once a step."""
        suffix = _stream("", batch)
        found = dict(
            self.task.prepare(self.fields(batch), Draws(self.seed, suffix, batch.positions))
        )
        return replace(batch, real=found.pop(self.task.target), inputs=found)

    def fields(self, batch: Batch, generated: Fields = MappingProxyType({})) -> Record:
        """Return the samples' fields, with generated ones in place of real ones."""
        return Record({self.task.target: batch.real, **batch.inputs, **generated})

    def shown(self, batch: Batch, generated: Fields = MappingProxyType({})) -> Tensor:
        """Return what the discriminator sees of real samples, or of generated ones."""
        return self.task.shown(self.fields(batch, generated))

    def generate(
        self,
        batch: Batch,
        stream: str = "latents",
        generator: nn.Module | None = None,
        latents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the generated fields of the batch, in the dtype of real samples.

        Args:
            batch: its inputs and labels are the generator's.
            stream: of the latents.
            generator: instead of the one in its data-parallel wrapper.
            latents: instead of those that are drawn.
        """
        network = generator or self.generator
        inputs = self.task.inputs(self.fields(batch))
        if self.task.takes_latents:
            inputs = (self.latents(batch, stream) if latents is None else latents, *inputs)
        noise = self._noise(network, "generator", batch)
        with self._forward("generator", "generator", batch), self._computing(batch.real):
            output = network(*inputs, batch.labels, *noise)
        generated = output if isinstance(output, dict) else {self.task.target: output}
        target = generated.get(self.task.target)
        _require_output("generator", target, (len(batch), *batch.real.shape[1:]), batch.real)
        return {name: tensor.to(batch.real.dtype) for name, tensor in generated.items()}

    def fakes(self, batch: Batch, stream: str = "latents") -> dict[str, Tensor]:
        """Generate without a graph, for a phase that does not train the generator."""
        with torch.no_grad():
            return self.generate(batch, stream, bare(self.generator))

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
            output = network(shown, batch.labels, *noise)
        maps, features = parse(output) or ((output,), ())
        for logits in maps:
            shape = (len(samples),) if len(maps) == 1 and not features else None
            _require_output("discriminator", logits, shape, samples)
        return Scores(samples, tuple(logits.to(samples.dtype) for logits in maps), features)

    def backward_real(self, batch: Batch) -> RealSide:
        """Score the real samples, and backpropagate at once what does not depend on the fakes.

        These are penalties at the real samples, and their part of the loss where nothing couples
        it to the fakes. Then the graphs of the two sides are never held at the same time.
        """
        loss = self.loss.discriminator
        coupled = not isinstance(loss, Sum) or bool(self.due(batch.step, "logits"))
        samples = self.differentiable(self.shown(batch), batch.step, "real")
        if coupled and not has_derivatives_of_gpus(samples):
            # torch's activations have second derivatives of zero, which would take a backward
            # through the network that the coupled loss shares if penalties wait for it.
            return RealSide(self.discriminate(samples, batch, "real"))
        with without_reduction(self.discriminator):  # the backward of the fakes sends all
            scores = self.discriminate(samples, batch, "real")
            total, observations = self._penalties(batch, "real", samples, scores.logits)
            if isinstance(loss, Sum) and not coupled:
                real_loss = mean_over_maps(loss.real, scores)
                total = real_loss if total is None else real_loss + total
            if total is not None:
                torch.autograd.backward(batch.mean(total), retain_graph=coupled)
        if coupled:
            return RealSide(scores, penalties=observations)
        return RealSide(scores.detach(), real_loss.detach(), observations)

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
            total = real_side.loss + mean_over_maps(loss.fake, fake)
        else:
            total = mean_over_maps(loss, real, fake)
        real_logits, fake_logits = real.logits, fake.logits
        observations = {
            "loss/discriminator": total.detach(),
            "logits/real": real_logits.detach(),
            "logits/fake": fake_logits.detach(),
            "logits/pairwise_accuracy": (real_logits > fake_logits).to(total.dtype),
        }
        if self.augmentation is not None:
            observations |= self.augmentation.observe(real_logits.detach())
        sides: dict[Side, tuple[Tensor, Tensor]] = {
            "fake": (penalized.samples, penalized.logits),
            "logits": (real_logits, fake_logits),
        }
        if real_side.penalties is None:
            sides["real"] = (real.samples, real_logits)
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

    def generator_loss(
        self, batch: Batch, generated: Fields, fake: Scores, real: Scores | None
    ) -> tuple[Tensor, Observations]:
        """Return the generator's loss of each sample without penalties, [n], and what to report.

        Args:
            batch: of this phase.
            generated: fields with their graph.
            fake: scores of the generated samples.
            real: scores of the real samples without a graph, if :attr:`needs_real_scores`.
        """
        context = self.context(batch, generated, fake, real)
        # Of a loss that reads no real logits, the first argument has no effect.
        theirs = real or replace(fake, maps=tuple(map(torch.zeros_like, fake.maps)))
        total = mean_over_maps(self.loss.generator, theirs, fake)
        observations = Observations()
        samples_seen = batch.step * self.step_samples
        if not self.terms and self.adversarial_weight == Schedule.constant(1.0):
            return total, observations
        observations["loss/adversarial"] = total.detach()
        weight = batch.scheduled.get("adversarial", self.adversarial_weight.at(samples_seen))
        adversarial = total = weight * total
        for weighted in self.terms:
            value = weighted.term(context)
            observations[f"term/{weighted.name}"] = value.detach()
            weight = batch.scheduled.get(f"term/{weighted.name}", weighted.weight_at(samples_seen))
            total = total + weight * value
        observations["loss/terms"] = (total - adversarial).detach()
        return total, observations

    def context(
        self, batch: Batch, generated: Fields, fake: Scores, real: Scores | None
    ) -> Context:
        """Return what terms are functions of; see :meth:`generator_loss`."""
        return Context(self.fields(batch), self.fields(batch, generated), fake, real)

    @cached_property
    def needs_real_scores(self) -> bool:
        """Whether the generator's loss reads the discriminator's outputs for real samples."""
        return self.loss.generator_reads_real or any(w.term.needs_features for w in self.terms)

    def real_scores(self, batch: Batch, discriminator: nn.Module) -> Scores | None:
        """Return scores of the real samples without a graph, if the generator's loss reads them."""
        if not self.needs_real_scores:
            return None
        with torch.no_grad():
            return self.discriminate(self.shown(batch), batch, "real", discriminator)

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

        def made() -> Tensor:
            return self.shown(batch, self.fakes(batch))

        if at == "real":
            side = scores(self.shown(batch), "real")
        elif at == "fake":
            side = scores(made(), "fake")
        elif at == "between":
            side = self.between(batch, self.shown(batch), made())
        else:
            real, fake = scores(self.shown(batch), "real"), scores(made(), "fake")
            return real.logits, fake.logits
        return side.samples, side.logits

    def _at_latents(
        self, batch: Batch, due: list[ScheduledPenalty]
    ) -> tuple[list[Tensor], Observations]:
        latents = self.latents(batch).detach().requires_grad_()
        styles_of = getattr(bare(self.generator), "styles", None)
        with _outputs(styles_of if isinstance(styles_of, nn.Module) else None) as styles:
            fakes = self.generate(batch, latents=latents)[self.task.target]
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
        strength = batch.scheduled.get(f"penalty/{scheduled.name}", now)
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


def _require_output(
    player: PlayerName, out: object, shape: tuple[int, ...] | None, like: Tensor
) -> None:
    """Refuse what is no floating-point tensor of this shape on the device of ``like``.

    Of the shape None, one with as many samples.
    """
    fits = isinstance(out, Tensor) and (
        out.shape == shape if shape else out.dim() > 0 and len(out) == len(like)
    )
    if isinstance(out, Tensor) and fits and out.is_floating_point():
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
        f"must return {what}, a floating-point tensor {shape or (len(like), ...)} on "
        f"{like.device}; found {found}",
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
