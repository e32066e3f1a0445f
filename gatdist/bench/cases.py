"""Networks and batches that are measured, and gatdist's own step by rule and precision.

The game: nonsaturating losses, no penalties, Adam, and one fixed random batch (no loader).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.bench.rounds import Seconds, timed
from gatdist.common.errors import ConfigError, nearest
from gatdist.config import Config, parse_config
from gatdist.data.order import WorkerShare
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import Communicator, LocalCommunicator
from gatdist.parallel.recording import Recorder
from gatdist.training.graphs import StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

# Sections of a configuration, and the keys that a case sets.
Overrides = dict[str, dict[str, Any]]

BFLOAT16: Overrides = {"precision": {"dtype": "bfloat16", "channels_last": True}}
# So small that the discriminator does not overfit the batch: its gradients would become denormal
# numbers, which CPUs compute slowly.
LEARNING_RATE = 1e-5
_LARGEST_PERIOD = 4096


@dataclass(frozen=True)
class Size:
    """A pair of registered networks, the shape of a sample, and the batch per process."""

    name: str
    network: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    batch: int
    model: Mapping[str, Any] = field(default_factory=dict)

    def config(self, overrides: Overrides, workers: int = 1) -> Config:
        """Return an endless run of this size with ``workers`` times the batch.

        Raises:
            ConfigError: The overrides are wrong.
        """
        network = {"name": self.network, **self.options}
        optimizer = {"learning_rate": LEARNING_RATE}
        values: dict[str, dict[str, Any]] = {
            "run": {"total_samples": 2**62, "global_batch": self.batch * workers},
            "data": {"url": "made-up"},
            "model": {"generator": network, "discriminator": network, **self.model},
            "optim": {"generator": optimizer, "discriminator": optimizer},
        }
        for section, keys in overrides.items():
            values[section] = values.get(section, {}) | keys
        return parse_config(values)

    def real(self, config: Config) -> Tensor:
        """Return the random batch of one process, [batch, *shape] in [−1, 1]."""
        generator = torch.Generator().manual_seed(0)
        real = torch.rand(self.batch, *self.shape, generator=generator) * 2 - 1
        return real.to(DTYPES[config.precision.dtype], memory_format=layout(config, real))


def layout(config: Config, real: Tensor) -> torch.memory_format:
    """Return the configured memory format of a batch."""
    last = config.precision.channels_last and real.dim() == 4
    return torch.channels_last if last else torch.contiguous_format


USUAL_SIZES = (
    Size("dcgan64_w4", "dcgan", {"width": 4}, (3, 64, 64), 8),
    Size("dcgan64_w32", "dcgan", {"width": 32}, (3, 64, 64), 32),
    Size("residual_w32", "residual", {"width": 32, "max_width": 128}, (3, 32, 32), 16),
)
# One of each family.
_R3GAN = {"width": 16, "max_width": 64, "group_width": 8, "blocks": 1}
_STYLEGAN2 = {"capacity": 1024, "max_width": 64}
_BOTH = {"spectral_norm": ["generator", "discriminator"]}
FAMILY_SIZES = (
    Size("sngan32", "sngan", {"width": 32}, (3, 32, 32), 16, {"spectral_norm": ["discriminator"]}),
    Size("biggan32", "biggan", {"width": 16}, (3, 32, 32), 16, _BOTH),
    Size("r3gan32", "r3gan", _R3GAN, (3, 32, 32), 16),
    Size("stylegan2_32", "stylegan2", _STYLEGAN2, (3, 32, 32), 16),
    Size("wavegan4096", "wavegan", {"width": 8}, (1, 4096), 16),
    Size("text16", "text_convolutional", {"width": 64, "blocks": 3}, (27, 16), 32),
)
SIZES = {size.name: size for size in (*USUAL_SIZES, *FAMILY_SIZES)}


def steps_by_penalties(config: Config) -> dict[str, tuple[int, float]]:
    """Return a step for each set of penalties that are due together, and its share of all steps.

    By the names of the penalties, or "" where none is due.
    """
    every = {name: penalty.every_steps for name, penalty in config.game.penalties.items()}
    period = min(math.lcm(*every.values()), _LARGEST_PERIOD)
    first: dict[str, int] = {}
    number: Counter[str] = Counter()
    for step in range(1, period + 1):
        due = ", ".join(name for name, steps in every.items() if step % steps == 0)
        first.setdefault(due, step)
        number[due] += 1
    return {due: (step, number[due] / period) for due, step in first.items()}


def chosen(option: str, requested: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the requested names (default: all) as ordered in ``known``, or raise ConfigError."""
    known = list(known)
    for name in requested:
        if name not in known:
            raise ConfigError(option, f"not known. {nearest(name, known)}", value=name)
    return [name for name in known if name in requested or not requested]


class Case(ABC):
    """An implementation of the game's step; its networks have no wrappers."""

    generator: nn.Module
    discriminator: nn.Module

    @abstractmethod
    def step(self) -> None: ...

    def run(self, num_steps: int) -> Seconds:
        """Time ``num_steps`` steps, after one that warms up caches."""
        self.step()
        _synchronize()

        def steps() -> None:
            for _ in range(num_steps):
                self.step()
            _synchronize()

        return timed(steps)

    def release_gradients(self) -> None:
        for network in (self.generator, self.discriminator):
            network.zero_grad(set_to_none=True)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _rule(name: str, **more: object) -> Overrides:
    return {"game": {"update_rule": name, "latents": "shared", **more}}


RULES: dict[str, Overrides] = {
    "alternating": _rule("alternating"),
    "alternating_atomic": _rule("alternating") | {"health": {"atomic": True}},
    "alternating_kept": _rule("alternating", reuse_fakes=True),
    "alternating_kept_bfloat16": _rule("alternating", reuse_fakes=True) | BFLOAT16,
    "alternating_bfloat16": _rule("alternating") | BFLOAT16,
    "canonical": _rule("alternating") | {"run": {"reduction": "canonical", "virtual_workers": 2}},
    "simultaneous": _rule("simultaneous"),
    "one_stage": _rule("one_stage"),
    "one_stage_bfloat16": _rule("one_stage") | BFLOAT16,
    "extragradient": _rule("extragradient"),
    "optimistic": _rule("optimistic"),
}


def alone(rule: str) -> Overrides:
    """Return the rule of an independent process; a canonical one would do every worker's work."""
    return RULES["alternating" if rule == "canonical" else rule]


class GatdistCase(Case):
    """gatdist's own training step on a fixed batch [n, *shape] of this worker.

    ``inputs``: the samples' further fields. Default ``comm``: this process alone. With a
    ``recorder``, steps are recorded as graphs.
    """

    def __init__(
        self,
        config: Config,
        real: Tensor,
        comm: Communicator | None = None,
        recorder: Recorder | None = None,
        labels: Tensor | None = None,
        num_classes: int = 0,
        metadata: Mapping[str, Any] = MappingProxyType({}),
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        comm = comm or LocalCommunicator(torch.device("cpu"))
        device = comm.device
        self.config, self.labels = config, labels
        shape = tuple(real.shape[1:])
        self.state = TrainState(config, comm, shape, num_classes, metadata, recorder)
        self.graphs = StepGraphs(recorder) if recorder else None
        self.rule = self.state.rule(config)
        self.generator = self.state.players["generator"].bare
        self.discriminator = self.state.players["discriminator"].bare
        self.real, self.inputs = real.to(device), inputs
        share = WorkerShare.from_config(config, comm.rank, comm.world_size)
        self.places = torch.from_numpy(share.positions(0, share.local_batch))
        self.positions = self.places.to(device)
        self.statistics, self.timer = Statistics(device), PhaseTimer(device)

    def at(self, step: int) -> None:
        """Make ``step`` the index of the next step."""
        self.state.samples_seen = step * self.config.step_samples

    def step(self) -> None:
        seen = self.state.samples_seen
        step = seen // self.config.step_samples
        positions = self.positions + seen
        batch = Batch(
            self.real,
            self.labels,
            positions,
            step,
            self.config.step_samples,
            host_positions=self.places,
            inputs=self.inputs,
        )
        train_step(
            self.state, self.rule, batch, self.config, self.statistics, self.timer, self.graphs
        )


def gatdist_case(
    size: Size,
    overrides: Overrides,
    comm: Communicator | None = None,
    recorder: Recorder | None = None,
) -> GatdistCase:
    """Build gatdist's case of a size; each worker has the size's batch."""
    config = size.config(overrides, comm.world_size if comm else 1)
    return GatdistCase(config, size.real(config), comm, recorder)
