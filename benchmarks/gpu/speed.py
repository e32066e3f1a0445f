"""Time, memory and kernels of a preset's step, by implementation."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import kernels
from gatdist.bench.cases import GatdistCase, steps_by_penalties
from gatdist.bench.handwritten import HandWritten
from gatdist.bench.memory import measure_memory
from gatdist.bench.presets import PRESETS, PresetCase
from gatdist.bench.published import with_published_operators
from gatdist.bench.rounds import settled
from gatdist.config import Config
from gatdist.nn import without_kernels
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.recording import cuda_recorder
from gatdist.training.graphs import WARM_UP_STEPS
from gatdist.training.step import as_configured

BUDGETS = Path(__file__).resolve().parents[2] / "tests" / "fake_cuda" / "budgets.json"
StepCase = GatdistCase | HandWritten
Build = Callable[[PresetCase, Config, torch.device], StepCase]
# Of the medians that a step's time is taken from.
ROUNDS, TURN_S = 5, 1.0


def gatdist(case: PresetCase, config: Config, device: torch.device) -> GatdistCase:
    """Build gatdist's own step."""
    return GatdistCase(
        config,
        case.real(config, device),
        LocalCommunicator(device),
        cuda_recorder(device) if config.precision.cuda_graphs else None,
        case.labels(config, device),
        case.classes,
        case.metadata,
        case.inputs(config, device),
    )


def hand_written(
    case: PresetCase,
    config: Config,
    device: torch.device,
    change: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> HandWritten:
    """Build the hand-written step, with networks that ``change`` changes."""
    generator, discriminator = (change(each.to(device)) for each in case.networks(config))
    return case.hand_written(config, device, (generator, discriminator))


def published(case: PresetCase, config: Config, device: torch.device) -> HandWritten:
    """Build the hand-written step with the operators of published code."""
    return hand_written(case, config, device, with_published_operators)


def published_by_sample(case: PresetCase, config: Config, device: torch.device) -> HandWritten:
    """Build the same with StyleGAN2's weights by sample."""

    def change(network: nn.Module) -> nn.Module:
        return with_published_operators(network, by_sample=True)

    return hand_written(case, config, device, change)


# By name: builder and settings. Graphs hold the betas of Adam, so that these must be constant.
_CONSTANT = [f"optim.{player}.betas=[0.0, 0.99]" for player in ("generator", "discriminator")]
IMPLEMENTATIONS: dict[str, tuple[Build, list[str]]] = {
    "gatdist": (gatdist, []),
    "gatdist_graphs": (gatdist, ["precision.cuda_graphs=true", *_CONSTANT]),
    "gatdist_without_triton": (gatdist, []),
    "gatdist_compiled": (gatdist, ["precision.compile=['generator']"]),
    "hand_written": (hand_written, []),
    "published": (published, []),
    "published_by_sample": (published_by_sample, []),
}


def measure(
    preset: str, implementation: str, device: torch.device, size: str, turn_s: float = TURN_S
) -> dict[str, Any]:
    """Measure one implementation of a preset's step.

    Returns:
        ``steps``, for each set of penalties that are due together: ``share`` of all steps,
        ``step_s`` (median of rounds; ``low``, ``high``), ``host_s`` (until a single step is
        launched), on CUDA ``kernels`` (launches) and ``busy_s`` (their time). And of a mean step
        ``step_s`` and ``samples_per_s``; ``peak_bytes`` with networks and optimizers;
        ``reserved_bytes`` of the allocator on CUDA; ``budget`` of a full-sized preset.
    """
    build, settings = IMPLEMENTATIONS[implementation]
    if "precision.cuda_graphs=true" in settings and device.type != "cuda":
        return {"skipped": "needs CUDA"}
    case = PRESETS[preset] if size == "full" else PRESETS[preset].small()
    config = case.config(settings)
    kernels_of_triton = without_kernels() if "without_triton" in implementation else nullcontext()
    with as_configured(config), settled(), kernels_of_triton:
        if device.type != "cuda":
            memory = measure_memory(lambda: build(case, config, device))
            peak = {"peak_bytes": memory.state_bytes + memory.peak_bytes}
        built = build(case, config, device)
        steps = {}
        for due, (number, share) in steps_by_penalties(config).items():
            steps[due] = {"share": share, **_timed(built, number, device, turn_s)}
            steps[due] |= kernels.launched(partial(_step, built, number), device)
        if device.type == "cuda":
            peak = {
                "peak_bytes": torch.cuda.max_memory_allocated(device),
                "reserved_bytes": torch.cuda.max_memory_reserved(device),
            }
    step_s = sum(each["share"] * each["step_s"] for each in steps.values())
    return {
        "batch": config.run.global_batch,
        "steps": steps,
        "step_s": step_s,
        "samples_per_s": config.step_samples / step_s,
        **peak,
        "budget": budget(preset, steps) if size == "full" else {},
    }


def _step(case: StepCase, number: int) -> None:
    case.at(number)
    case.step()


def _timed(case: StepCase, number: int, device: torch.device, turn_s: float) -> dict[str, float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def turn(steps: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            _step(case, number)
        wait()
        return (time.perf_counter() - began) / steps

    turn(WARM_UP_STEPS + 2 if device.type == "cuda" else 1)  # a graph is recorded after these
    steps = max(1, round(turn_s / turn(1)))
    host = []
    for _ in range(3):
        gc.collect()
        wait()
        began = time.perf_counter()
        _step(case, number)
        host.append(time.perf_counter() - began)
    seconds = [turn(steps) for _ in range(ROUNDS)]
    return {
        "step_s": median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "host_s": median(host),
    }


def budget(preset: str, steps: dict[str, Any]) -> dict[str, Any]:
    """Return the computed costs of the preset's kinds of steps that have a budget, by penalties."""
    known = json.loads(BUDGETS.read_text(encoding="utf-8"))[f"preset/{preset}"]
    kinds = {"": "plain"} | {max(steps, key=len): "due"}
    keys = ("operators", "peak_gib", "roofline_ms")
    return {
        due: {key: known[kind][key] for key in keys if key in known[kind]}
        for due, kind in kinds.items()
        if due in steps and kind in known
    }
