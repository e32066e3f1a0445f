"""Lower bounds of a step's time on GPUs, from its operators and the GPUs' data sheets.

An operator takes at least its floating-point operations divided by the GPU's peak, and at least the
bytes it reads and writes divided by the memory bandwidth (Williams et al. 2009, "Roofline: an
insightful visual performance model for multicore architectures").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gatdist.bench.cases import steps_by_penalties
from gatdist.bench.step_costs import Costs, step_costs
from gatdist.common.registry import user_code
from gatdist.common.seeding import generators_kept
from gatdist.config import Config
from gatdist.data.dataset import open_dataset
from gatdist.data.order import WorkerShare
from gatdist.monitor.numbers import aligned

# Assumed time in which the host launches one kernel.
LAUNCH_S = 5e-6


@dataclass(frozen=True)
class Gpu:
    """Figures of NVIDIA's data sheets, without sparsity.

    Attributes:
        bytes_per_s: Memory bandwidth.
        memory_bytes: Memory.
        float32: Floating-point operations per second outside of tensor cores.
        tf32, float16, bfloat16: Of tensor cores; 0 if the GPU does not compute in this format.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    float32: float
    tf32: float
    float16: float
    bfloat16: float

    def flops_per_s(self, dtype: torch.dtype, *, tf32: bool) -> float:
        """Return the peak of products in ``dtype``, in float32 or TF32 for other types."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.float16 if dtype == torch.float16 else self.bfloat16
        return (tf32 and self.tf32) or self.float32


GPUS = (
    Gpu("T4", 16e9, 300e9, 8.1e12, 0, 65e12, 0),
    Gpu("V100 SXM2", 32e9, 900e9, 15.7e12, 0, 125e12, 0),
    Gpu("A10", 24e9, 600e9, 31.2e12, 62.5e12, 125e12, 125e12),
    Gpu("L4", 24e9, 300e9, 30.3e12, 60e12, 121e12, 121e12),
    Gpu("RTX 4090", 24e9, 1008e9, 82.6e12, 82.6e12, 165.2e12, 165.2e12),
    Gpu("L40S", 48e9, 864e9, 91.6e12, 183e12, 362e12, 362e12),
    Gpu("A100 SXM", 80e9, 2039e9, 19.5e12, 156e12, 312e12, 312e12),
    Gpu("H100 SXM", 80e9, 3350e9, 67e12, 494e12, 989e12, 989e12),
    Gpu("H200 SXM", 141e9, 4800e9, 67e12, 494e12, 989e12, 989e12),
    Gpu("B200", 180e9, 7700e9, 75e12, 1100e12, 2250e12, 2250e12),
)


@dataclass(frozen=True)
class Bound:
    """Least time of a step on a GPU, and the part of it in which memory is the limit."""

    seconds: float
    in_memory_s: float


def bound(costs: Costs, gpu: Gpu, *, tf32: bool) -> Bound | None:
    """Return the least time of a step, or None if the GPU does not compute in its format."""
    seconds = in_memory_s = 0.0
    for (dtype, flops, moved), count in costs.kernels.items():
        rate = gpu.flops_per_s(dtype, tf32=tf32)
        if flops and not rate:
            return None
        computing_s, moving_s = (flops / rate if flops else 0.0), moved / gpu.bytes_per_s
        seconds += count * max(computing_s, moving_s)
        in_memory_s += count * moving_s * (moving_s >= computing_s)
    return Bound(seconds, in_memory_s)


@generators_kept()
def estimate(config: Config) -> dict[str, Any]:
    """Return what a step costs on one of the run's GPUs, and the least time that it takes.

    Counted on fake tensors, for the most workers; without communication between GPUs.

    Returns:
        JSON values: ``batch`` of a GPU; ``steps``, each with the ``penalties`` that are due, their
        ``share`` of all steps, ``operators``, ``tflop``, ``gib`` through kernels and ``peak_gib``;
        ``launch_s``, the time in which the host launches a mean step's kernels; ``gpus``, each with
        its ``name``, ``step_s`` of a mean step and ``samples_per_s`` (None if it lacks the format),
        ``memory_share`` of that time, and whether the step ``fits`` its memory.

    Raises:
        PluginError: A user's network can't run on tensors without values.
    """
    workers = config.fitting_workers()[-1]
    dataset = open_dataset(config.data)
    steps = steps_by_penalties(config)
    networks = f"{config.model.generator.name}, {config.model.discriminator.name}"
    with user_code(
        "model", "can't run on tensors without values", value=networks, hint="Leave out --device"
    ):
        costs = step_costs(
            _on_one_worker(config, workers),
            dataset.sample_format.shape,
            dataset.num_classes,
            dataset.sample_format.metadata,
            {name: step for name, (step, _) in steps.items()},
        )
    shares = {name: share for name, (_, share) in steps.items()}
    operators = sum(shares[name] * found.operators for name, found in costs.items())
    return {
        "batch": len(WorkerShare.from_config(config, 0, workers).places),
        "steps": [
            {
                "penalties": name.split(", ") if name else [],
                "share": shares[name],
                "operators": found.operators,
                "tflop": found.flops / 1e12,
                "gib": found.bytes / 2**30,
                "peak_gib": found.peak_bytes / 2**30,
            }
            for name, found in costs.items()
        ],
        "launch_s": operators * LAUNCH_S,
        "gpus": [
            _on(gpu, costs, shares, config.step_samples / workers, config.precision.tf32)
            for gpu in GPUS
        ],
    }


def _on_one_worker(config: Config, workers: int) -> Config:
    """Return the run of the worker with the most samples alone, with its share of the batch."""
    shares = {}
    if config.run.reduction == "canonical":
        leaves = -(-config.run.virtual_workers // workers)
        parts = 1 << (leaves.bit_length() - 1)  # of a number that is valid, and no more
        workers = config.run.virtual_workers // parts
        shares["virtual_workers"] = parts
    shares["global_batch"] = -(-config.run.global_batch // workers)
    size = config.game.generator_batch  # None suits all rules
    game = {"generator_batch": None if size is None else -(-size // workers)}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=shares),
            "game": config.game.model_copy(update=game),
        }
    )


def _on(
    gpu: Gpu, costs: Mapping[str, Costs], shares: Mapping[str, float], samples: float, tf32: bool
) -> dict[str, Any]:
    """Return the bounds of a mean step on a GPU, of which it has ``samples`` real samples."""
    fits = max(found.peak_bytes for found in costs.values()) <= gpu.memory_bytes
    row: dict[str, Any] = {"name": gpu.name, "fits": fits}
    bounds = {name: bound(found, gpu, tf32=tf32) for name, found in costs.items()}
    seconds = in_memory_s = 0.0
    for name, least in bounds.items():
        if least is None:
            return row | {"step_s": None, "samples_per_s": None, "memory_share": None}
        seconds += shares[name] * least.seconds
        in_memory_s += shares[name] * least.in_memory_s
    return row | {
        "step_s": seconds,
        "samples_per_s": samples / seconds,
        "memory_share": in_memory_s / seconds,
    }


def describe(found: Mapping[str, Any]) -> str:
    """Format what :func:`estimate` returns."""
    steps: list[tuple[str, ...]] = [
        ("penalties due", "of steps", "TFLOP", "GiB through kernels", "kernels", "peak GiB")
    ]
    steps += [
        (
            ", ".join(step["penalties"]) or "none",
            f"{step['share']:.3g}",
            f"{step['tflop']:.3g}",
            f"{step['gib']:.3g}",
            f"{step['operators']:,}",
            f"{step['peak_gib']:.3g}",
        )
        for step in found["steps"]
    ]
    gpus: list[tuple[str, ...]] = [
        ("GPU", "ms per step", "samples/s", "limited by memory bandwidth", "")
    ]
    gpus += [_row(gpu) for gpu in found["gpus"]]
    return "\n".join(
        [
            f"A step on one GPU with {found['batch']} samples, computed from shapes, not measured,",
            "with the fused kernels of gatdist.nn, which need Triton (in torch's builds for CUDA):",
            "",
            aligned(steps),
            "",
            f"The host launches a mean step's kernels in {found['launch_s'] * 1e3:.0f} ms, if each "
            f"takes {LAUNCH_S * 1e6:.0f} µs. CUDA graphs avoid most of it.",
            "Least time by peak rates and memory bandwidth, without communication:",
            "",
            aligned(gpus),
        ]
    )


def _row(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    fits = "" if gpu["fits"] else "does not fit its memory"
    if gpu["step_s"] is None:
        return gpu["name"], "", "", "", "does not compute in precision.dtype"
    times = f"{gpu['step_s'] * 1e3:.3g}", f"{gpu['samples_per_s']:,.0f}"
    return gpu["name"], *times, f"{gpu['memory_share']:.0%} of the time", fits
