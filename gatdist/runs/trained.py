"""The networks of a run, and its samples as a pure function of their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.common.seeding import generator_states, generators_kept, seed_all
from gatdist.config import BOTH, Config, LatentDistribution, PlayerName, import_plugins
from gatdist.data.dataset import Dataset
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import SampleFormat, sample_format_of
from gatdist.game.build import build_networks_of, build_task
from gatdist.game.tasks import Task
from gatdist.models import is_built_in
from gatdist.models.buffers import buffers_kept
from gatdist.models.layers import latents_from
from gatdist.parallel import draws
from gatdist.runs.checkpoint import GROUPS, Checkpoint
from gatdist.runs.checkpoints import Checkpoints
from gatdist.runs.directory import read_config
from gatdist.runs.mapped import Mapped
from gatdist.runs.state import require_saved_state
from gatdist.storage import Store

_SMALL_ANGLE = 1e-6
_MEAN_SAMPLES = 4096
_DIGITS = 20  # of a class's number; Python does not read thousands


class Inputs(NamedTuple):
    """Latents [n, latent_size], labels int64 [n] or None, noise () or ([n, noise_size],)."""

    latents: Tensor
    labels: Tensor | None
    noise: tuple[Tensor, ...]

    def rows(self, start: int, end: int) -> Self:
        latents, labels, noise = self
        labels = None if labels is None else labels[start:end]
        return type(self)(latents[start:end], labels, tuple(t[start:end] for t in noise))


class Sampler:
    """Generates sample i of a stream, independent of the device, the batch and other samples.

    The streams of a seed are independent. ``truncation`` trades diversity for quality (> 0; None:
    off). For a network with a ``mapping``, it is ψ in w̄ + ψ (w − w̄) with the mean style w̄ (Karras
    et al. 2019); for others, latents are drawn from the normal distribution truncated at this value
    (Brock et al. 2019). Uniform latents are a function of normal ones, and these are truncated.
    The network is called with up to ``at_once`` samples (None: with all).
    """

    def __init__(
        self,
        network: nn.Module,
        latent_size: int,
        num_classes: int,
        seed: int,
        stream: str,
        *,
        distribution: LatentDistribution = "normal",
        truncation: float | None = None,
        at_once: int | None = None,
    ) -> None:
        self.at_once = at_once
        self.network, self.latent_size, self.num_classes = network, latent_size, num_classes
        self.distribution = distribution
        self.seed, self.stream, self.truncation = seed, stream, truncation
        self._is_random: bool | None = None
        self._mapping: nn.Module | None = getattr(network, "mapping", None)

    @classmethod
    def from_config(
        cls,
        config: Config,
        network: nn.Module,
        num_classes: int,
        stream: str,
        *,
        seed: int | None = None,
        truncation: float | None = None,
        at_once: int | None = None,
    ) -> Self:
        """Return a sampler of a run's generator.

        ``num_classes`` is that of the data. ``seed`` is that of the run by default.
        """
        model = config.model
        return cls(
            network,
            model.latent_size,
            num_classes if model.conditional else 0,
            config.run.seed if seed is None else seed,
            stream,
            distribution=model.latent_distribution,
            truncation=truncation,
            at_once=at_once,
        )

    def labels(self, positions: Tensor) -> Tensor | None:
        if not self.num_classes:
            return None
        return draws.integers(self.seed, f"{self.stream}/labels", positions, self.num_classes)

    def inputs(self, positions: Tensor, labels: Tensor | None = None) -> Inputs:
        """Return the network's arguments for int64 positions [n]."""
        dtype = next(self.network.parameters()).dtype
        latents = latents_from(self._normal(positions, dtype), self.distribution)
        if not self.num_classes:
            labels = None
        elif labels is None:
            labels = self.labels(positions)
        noise = draws.of_network(self.network, self.seed, self.stream, positions, dtype)
        return Inputs(latents, labels, noise)

    def _normal(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the normal numbers [n, latent_size] that latents are made from."""
        drawn = draws.normal(self.seed, self.stream, positions, (self.latent_size,), dtype)
        if self.truncation is None or self._mapping is not None:
            return drawn
        return _cut_off(drawn, self.truncation)

    @torch.no_grad()
    def __call__(self, positions: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return samples [n, …] as networks see them; classes are random unless given."""
        made = []
        for start, end in self._parts(len(positions)):
            given = None if labels is None else labels[start:end]
            here = positions[start:end]
            made.append(self._generate(self.inputs(here, given), here))
        return _joined(made)

    @torch.no_grad()
    def between(self, first: int, last: int, shares: Tensor, label: int | None = None) -> Tensor:
        """Interpolate from sample ``first`` (share 0) to ``last`` (1), at ``shares`` [n]: [n, …].

        Latents follow a great circle (Shoemake 1985), uniform ones that of the normal numbers that
        they are made from. Class and noise are those of ``first``.
        """
        device = next(self.network.parameters()).device
        ends = torch.tensor([first, last], device=device)
        given = None if label is None else torch.full_like(ends, label)
        both = self.inputs(ends, given)
        start, end = self._normal(ends, both.latents.dtype)
        share, steps = shares.to(start)[:, None], len(shares)
        angle = torch.arccos((start @ end / (start.norm() * end.norm())).clamp(-1, 1))
        if angle.sin().abs() < _SMALL_ANGLE:  # equal or opposite: the great circle is not unique
            latents = (1 - share) * start + share * end
        else:
            weights = ((1 - share) * angle).sin(), (share * angle).sin()
            latents = (weights[0] * start + weights[1] * end) / angle.sin()
        _, labels, noise = both.rows(0, 1)
        labels = None if labels is None else labels.expand(steps)
        latents = latents_from(latents, self.distribution)
        inputs = Inputs(latents, labels, tuple(t.expand(steps, -1) for t in noise))
        positions, parts = ends[:1].expand(steps), self._parts(steps)
        return _joined(
            [self._generate(inputs.rows(*part), positions[slice(*part)]) for part in parts]
        )

    def _parts(self, count: int) -> list[tuple[int, int]]:
        size = self.at_once or count
        return [(start, min(count, start + size)) for start in range(0, count, size)]

    def _generate(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Call the network, and restore its buffers.

        A network that draws from torch's generator is called once per sample, seeded by position.
        """
        with generators_kept(), buffers_kept(self.network):
            if not self._draws(inputs):
                return self._call(inputs)
            made = []
            for i, position in enumerate(positions.tolist()):
                seed_all(self.seed, f"{self.stream}/forward", position)
                made.append(self._call(inputs.rows(i, i + 1)))
            return torch.cat(made)

    def _draws(self, inputs: Inputs) -> bool:
        """Return whether the network draws from torch's generator, tried with the first sample."""
        if self._is_random is None:
            seed_all(self.seed, f"{self.stream}/forward", 0)
            before = generator_states(inputs.latents.device)
            self._call(inputs.rows(0, 1))
            self._is_random = before != generator_states(inputs.latents.device)
        return self._is_random

    def _call(self, inputs: Inputs) -> Tensor:
        if self.truncation is None or self._mapping is None:
            return self.network(inputs.latents, inputs.labels, *inputs.noise)
        mean, share = self._mean_style, self.truncation
        handle = self._mapping.register_forward_hook(
            lambda module, inputs, styles: mean + share * (styles - mean)
        )
        try:
            return self.network(inputs.latents, inputs.labels, *inputs.noise)
        finally:
            handle.remove()

    @cached_property
    def _mean_style(self) -> Tensor:
        """The mean style of 4,096 latents (and classes), the same for every seed."""
        assert self._mapping is not None
        like = next(self.network.parameters())
        drawn = Sampler(
            self.network,
            self.latent_size,
            self.num_classes,
            0,
            "truncation",
            distribution=self.distribution,
        )
        positions = torch.arange(_MEAN_SAMPLES, device=like.device)
        found = drawn.inputs(positions)
        return self._mapping(found.latents, found.labels).mean(dim=0)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut_off(latents: Tensor, limit: float) -> Tensor:
    """Map normal numbers to the normal distribution truncated to ±limit."""
    below = torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))
    share = torch.special.ndtr(latents.double())
    return torch.special.ndtri(below + share * (1 - 2 * below)).to(latents.dtype)


@dataclass(frozen=True)
class TrainedRun:
    """Both networks of a run's newest checkpoint, in evaluation mode; the averaged generator."""

    generator: nn.Module
    discriminator: nn.Module
    config: Config
    checkpoint: Checkpoint
    sample_format: SampleFormat

    @property
    def num_classes(self) -> int:
        return self.sample_format.num_classes if self.config.model.conditional else 0

    def class_number(self, word: str, key: str) -> int:
        """Return the number of a class, given by number or name. Raises ConfigError about key."""
        if not self.num_classes:
            rule = "the run's generator is not class-conditional"
            raise ConfigError(key, rule, value=word, hint="Remove it")
        names = self.sample_format.spec.class_names or []
        is_number = word.isdecimal() and len(word) < _DIGITS
        number = names.index(word) if word in names else int(word) if is_number else -1
        if not 0 <= number < self.num_classes:
            known = f", or one of {', '.join(names[:10])}" if names else ""
            rule = f"must be a class: 0 to {self.num_classes - 1}{known}"
            raise ConfigError(key, rule, value=word)
        return number

    def sampler(self, seed: int, stream: str, truncation: float | None = None) -> Sampler:
        return Sampler.from_config(
            self.config,
            self.generator,
            self.sample_format.num_classes,
            stream,
            seed=seed,
            truncation=truncation,
            at_once=self.at_once,
        )

    @cached_property
    def task(self) -> Task:
        return build_task(self.config, self.sample_format.shape, self.sample_format.metadata)

    def mapped(self, dataset: Dataset, stream: str) -> Mapped:
        """Return the outputs for the samples of a data set."""
        return Mapped(self.config, self.task, self.generator, dataset, stream, self.at_once)

    @property
    def at_once(self) -> int | None:
        """Samples that the generator makes at once. See :meth:`~gatdist.config.Config.at_once`."""
        device = next(self.generator.parameters()).device
        return self.config.at_once(self.config.cluster.max_workers, device.type)


def load_run(run: Store, device: torch.device, checkpoint: str = "") -> TrainedRun:
    """Load the networks of a run; raise CheckpointError without a checkpoint of these networks.

    ``checkpoint`` is the name of one, or its ``samples_seen``; "" is the newest.
    """
    config = read_config(run)
    if config is None:
        rule = "is not a run directory (it has no config.json)"
        raise CheckpointError(run.url, rule, hint="Check the path")
    found = Checkpoints(run.child("checkpoints")).find(checkpoint, [*GROUPS.values()])
    if found is None:
        hint = "Let the run reach run.checkpoint_every_samples"
        raise CheckpointError(run.url, "has no checkpoint yet", hint=hint)
    subject = f"{run.url}: {found.name}/state.json"
    require_saved_state(found.state, subject, found.named_samples)
    try:
        sample_format = sample_format_of(ReadSpec.model_validate(found.state["samples"]))
    except (ValidationError, KeyError, TypeError, ValueError, OverflowError) as error:
        rule = f"is not a sample format ({error!r})"
        raise CheckpointError(f"{subject}: samples", rule) from None
    import_plugins(config.plugins)
    weights = {player: found.weights(player) for player in BOTH}
    built = networks_with(config, sample_format, weights, run.url)
    for network in built:
        network.to(device)
    return TrainedRun(*built, config, found, sample_format)


def networks_with(
    config: Config,
    sample_format: SampleFormat,
    weights: Mapping[PlayerName, Mapping[str, Tensor]],
    subject: str,
) -> tuple[nn.Module, nn.Module]:
    """Build generator and discriminator with these weights, on the CPU, in evaluation mode.

    Shapes of built-in networks are checked on the meta device first, before anything is allocated.
    A player without weights keeps its initial ones. Weights of other networks: CheckpointError.
    """
    shape, num_classes = sample_format.shape, sample_format.num_classes
    task = build_task(config, shape, sample_format.metadata)
    build = partial(build_networks_of, config, task, shape, num_classes, sample_format.metadata)

    def fill(networks: tuple[nn.Module, nn.Module], *, assign: bool = False) -> None:
        for network, player in zip(networks, BOTH, strict=True):
            if player in weights:
                network.load_state_dict(weights[player], assign=assign)
            network.eval().requires_grad_(False)

    try:
        if all(is_built_in(config, player) for player in BOTH):  # others may read values
            with torch.device("meta"):
                shapes = build()
            fill(shapes, assign=True)
        built = build()
        fill(built)
    except RuntimeError as error:
        rule = f"holds weights of other networks ({error})"
        raise CheckpointError(subject, rule) from None
    return built
