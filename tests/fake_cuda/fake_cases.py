"""Training steps whose costs are counted: presets, and update rules in every precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from gatdist.bench.cases import SIZES
from gatdist.bench.step_costs import Costs, fake_tensors, step_costs
from gatdist.config import BOTH, Config, load_config

CUDA = torch.device("cuda", 0)


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


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Create tensors in the block as fake ones, also on ``cuda``."""
    with ExitStack() as stack:
        # Otherwise autocast would be off.
        no, yes = (lambda: False), (lambda *_: True)
        common = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(common, "amp_definitely_not_available", no))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", yes))
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
    with fake_cuda():
        return step_costs(
            case.config,
            case.shape,
            case.classes,
            case.metadata,
            steps(case.config),
            device=CUDA,
            locates=locates,
        )
