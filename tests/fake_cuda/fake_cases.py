"""Training steps whose costs are counted: presets, and update rules in every precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from step_costs import CostMode, Costs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gatdist.training.state
from gatdist.bench.cases import SIZES
from gatdist.config import BOTH, Config, load_config
from gatdist.models import DTYPES, build_networks
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

CUDA = torch.device("cuda", 0)
# Where schedules have moved from their start, so that the strength of an augmentation is not 0.
SAMPLES_SEEN = 2**20


@dataclass(frozen=True)
class FakeCase:
    """A run on one GPU of several.

    Attributes:
        config: Its global batch is the batch of one GPU.
        shape: Of one sample.
        classes: Of the data; 0 if unlabelled.
        metadata: Of the samples.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def _preset(
    name: str, shape: tuple[int, ...], classes: int = 0, batch: int | None = None, **metadata: Any
) -> Callable[[], FakeCase]:
    """``batch`` is that of one GPU; by default the whole batch, on one GPU."""

    def case() -> FakeCase:
        settings = [] if batch is None else [f"run.global_batch={batch}"]
        return FakeCase(load_config(name, settings), shape, classes, metadata)

    return case


# With 8 GPUs in presets of 256 or 512 samples, else 64 GPUs.
PRESETS: dict[str, Callable[[], FakeCase]] = {
    "biggan-128": _preset("biggan-128", (3, 128, 128), 1000, 32),
    "digits": _preset("digits", (1, 8, 8)),
    "digits-conditional": _preset("digits-conditional", (1, 8, 8), 10),
    "glyphs": _preset("glyphs", (1, 16, 16), 12),
    "glyphs-r3gan": _preset("glyphs-r3gan", (1, 32, 32)),
    "glyphs-stylegan2": _preset("glyphs-stylegan2", (1, 32, 32)),
    "r3gan-256": _preset("r3gan-256", (3, 256, 256), 0, 32),
    "r3gan-64": _preset("r3gan-64", (3, 64, 64), 0, 32),
    "r3gan-cifar10": _preset("r3gan-cifar10", (3, 32, 32), 10, 64),
    "r3gan-imagenet-32": _preset("r3gan-imagenet-32", (3, 32, 32), 1000, 64),
    "r3gan-imagenet-64": _preset("r3gan-imagenet-64", (3, 64, 64), 1000, 64),
    "r3gan-stacked-mnist": _preset("r3gan-stacked-mnist", (3, 32, 32), 0, 64),
    "ring": _preset("ring", (2,)),
    "sngan-128": _preset("sngan-128", (3, 128, 128), 1000),
    "sngan-32": _preset("sngan-32", (3, 32, 32), 10),
    "sngan-64": _preset("sngan-64", (3, 64, 64), 1000),
    "speech": _preset("speech", (1, 4096), 10, modality="audio", sample_rate=8000),
    "stylegan2-256": _preset("stylegan2-256", (3, 256, 256), 0, 8),
    "stylegan2-auto-256": _preset("stylegan2-auto-256", (3, 256, 256), 0, 8),
    "wavegan-16384": _preset("wavegan-16384", (1, 16384), modality="audio", sample_rate=16000),
    "words": _preset("words", (27, 12), modality="text"),
}


def _rule(name: str, dtype: str, **sections: Any) -> Callable[[], FakeCase]:
    def case() -> FakeCase:
        size = SIZES["residual_w32"]
        game = {"update_rule": name, **sections.get("game", {})}
        overrides = {**sections, "game": game, "precision": {"dtype": dtype}}
        return FakeCase(size.config(overrides), size.shape)

    return case


_TWO_ITERATIONS = {"loss": "minimax", "rule_options": {"max_iterations": 2}}
_SGD = {"name": "sgd", "learning_rate": 1e-3}
RULES: dict[str, Callable[[], FakeCase]] = {
    f"{rule}-{dtype}": _rule(rule, dtype, **sections)
    for dtype in ("float32", "bfloat16")
    for rule, sections in {
        "alternating": {},
        "simultaneous": {},
        "one_stage": {},
        "extragradient": {},
        "optimistic": {},
        "consensus": {},
        "competitive": {"game": _TWO_ITERATIONS, "optim": dict.fromkeys(BOTH, _SGD)},
    }.items()
}
RULES["alternating-float16"] = _rule("alternating", "float16")

CASES = {f"preset/{name}": case for name, case in PRESETS.items()}
CASES |= {f"rule/{name}": case for name, case in RULES.items()}

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Create tensors in the block as fake ones, and take those on ``cuda`` for real."""
    with ExitStack() as stack:
        # The fake device has no threads of its own.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Otherwise autocast would be off.
        no, yes = (lambda: False), (lambda *_: True)
        common = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(common, "amp_definitely_not_available", no))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", yes))
        # Networks are built on the CPU or on no device. ``Module.to`` can't move them to fake ones.
        stack.enter_context(mock.patch.object(gatdist.training.state, "build_networks", _networks))
        stack.enter_context(_FAKE)
        yield


def _networks(*args: Any) -> tuple[nn.Module, ...]:
    with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
        networks = build_networks(*args)
    for network in networks:
        _replace_tensors(network)
        network.to = lambda device, network=network: network  # type: ignore[method-assign]
    return networks


def _replace_tensors(network: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on CUDA."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            like = {"dtype": tensor.dtype, "device": CUDA}
            made = torch.empty_strided(tensor.shape, tensor.stride(), **like)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = made
        return fakes[id(tensor)]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                tensors[key] = None if tensor is None else fake(tensor)


def costs(case: FakeCase, *, locates: bool = False) -> dict[str, Costs]:
    """Return the costs of a step: ``due``, where every lazy penalty is due, and ``plain``.

    Only ``due`` if the two do not differ.
    """
    config = case.config
    intervals = [penalty.every_steps for penalty in config.game.penalties.values()]
    due = math.lcm(*intervals)
    with fake_cuda(), CostMode(locates=locates) as mode:
        state = TrainState(config, LocalCommunicator(CUDA), case.shape, case.classes, case.metadata)
        rule = state.rule(config)
        statistics, timer = Statistics(CUDA), PhaseTimer(torch.device("cpu"))
        step_samples = config.step_samples
        state.samples_seen = SAMPLES_SEEN
        real = torch.empty(step_samples, *case.shape, device=CUDA)
        real = real.to(DTYPES[config.precision.dtype])
        if config.precision.channels_last and real.dim() == 4:
            real = real.contiguous(memory_format=torch.channels_last)
        positions = torch.empty(step_samples, dtype=torch.int64, device=CUDA)
        labels = torch.empty_like(positions) if config.model.conditional else None

        def step(number: int) -> Costs:
            found = mode.start()
            batch = Batch(real, labels, positions, number)
            train_step(state, rule, batch, config, statistics, timer)
            return found

        step(1)  # what is created once, such as constants
        found = {"plain": step(1)} if max(intervals, default=1) > 1 else {}
        return {"due": step(due)} | found
