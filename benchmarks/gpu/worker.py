"""Run one part in this process: ``python -m benchmarks.gpu.worker NAME DEVICE SIZE OUT``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import correctness, kernels, speed
from gatdist.bench.environment import environment
from gatdist.bench.presets import PRESETS
from gatdist.config.environment import set_cuda_variables
from gatdist.training.step import as_configured

REPOSITORY = Path(__file__).resolve().parents[2]


def facts(device: torch.device, size: str) -> dict[str, Any]:
    """Return what a result is valid for, and the ``environment`` to report."""
    is_cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if is_cuda else None
    found = environment("torch", "triton", "numpy", "pydantic", gpu=gpu, cuda=torch.version.cuda)
    if is_cuda:
        found["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cudnn"] = torch.backends.cudnn.version()
    key = {
        "device": gpu or found["processor"],
        "size": size,
        "source": _source_digest(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    return {"key": key, "environment": found}


def _source_digest() -> str:
    """Identify the code also without a git checkout, and with changes."""
    digest = hashlib.sha256()
    for folder in ("gatdist", "benchmarks/gpu"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(name: str, device: torch.device, size: str) -> dict[str, Any]:
    """Run the part ``name``, or ``facts``."""
    kind, _, rest = name.partition("/")
    if kind == "facts":
        return facts(device, size)
    if kind == "correctness":
        return correctness.run(rest, device)
    preset, _, implementation = rest.partition("/")
    if kind == "speed":
        turn_s = speed.TURN_S if size == "full" else 0.05
        return speed.measure(preset, implementation, device, size, turn_s)
    case = PRESETS[preset] if size == "full" else PRESETS[preset].small()
    config = case.config()
    with as_configured(config):
        built = speed.gatdist(case, config, device)

        def step() -> None:  # with all penalties due
            built.at(0)
            built.step()

        for _ in range(3):
            step()
        return {"kernels": kernels.top(step, device)}


def main() -> None:
    name, device_name, size, out = sys.argv[1:]
    device = torch.device(device_name)
    set_cuda_variables(deterministic=name == "correctness/repeated")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    found = run(name, device, size)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
