"""Training steps whose costs are counted: presets, and update rules in every precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch

import gatdist.runs.trained
from gatdist.bench.cases import SIZES
from gatdist.bench.presets import PRESETS, PresetCase
from gatdist.bench.step_costs import Costs, fake_tensors, step_costs
from gatdist.config import BOTH, Config
from gatdist.nn import without_kernels

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class FakeCase:
    """A run on one GPU of several.

    Attributes:
        config: Its global batch is the batch of one GPU.
        shape: Of one sample.
        classes: Of the data; 0 if unlabelled.
        metadata: Of the samples.
        kernels: Whether the GPU has Triton, which torch's builds for CUDA bring along.
    """

    config: Config
    shape: tuple[int, ...]
    classes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    kernels: bool = True


def _preset(case: PresetCase, *, kernels: bool = True) -> FakeCase:
    return FakeCase(case.config(), case.shape, case.classes, dict(case.metadata), kernels)


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

CASES: dict[str, Callable[[], FakeCase]] = {
    f"preset/{name}": partial(_preset, case) for name, case in PRESETS.items()
}
# What has kernels of Triton, without them.
CASES |= {
    f"without-triton/{name}": partial(_preset, PRESETS[name], kernels=False)
    for name in ("r3gan-256", "stylegan2-256", "glyphs-r3gan", "glyphs-stylegan2")
}
CASES |= {f"rule/{name}": case for name, case in RULES.items()}


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Create tensors in the block as fake ones, also on ``cuda``."""
    with ExitStack() as stack:
        # Otherwise autocast would be off.
        no, yes = (lambda: False), (lambda *_: True)
        common = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(common, "amp_definitely_not_available", no))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", yes))
        # The fake device draws no random numbers.
        states = mock.patch.object(gatdist.runs.trained, "generator_states", return_value={})
        stack.enter_context(states)
        stack.enter_context(fake_tensors(CUDA))
        yield


def steps(config: Config) -> dict[str, int]:
    """Return the indices of a step ``due`` and, if it differs, of one that is ``plain``."""
    intervals = [penalty.every_steps for penalty in config.game.penalties.values()]
    plain = {"plain": 1} if max(intervals, default=1) > 1 else {}
    return {"due": math.lcm(*intervals)} | plain


def costs(case: FakeCase, *, locates: bool = False) -> dict[str, Costs]:
    """Return the costs of a step: ``due``, where every lazy penalty is due, and ``plain``.

    Only ``due`` if the two do not differ.
    """
    with fake_cuda(), nullcontext() if case.kernels else without_kernels():
        return step_costs(
            case.config,
            case.shape,
            case.classes,
            case.metadata,
            steps(case.config),
            device=CUDA,
            locates=locates,
        )
