"""The ring preset with five seeds: how many modes, and how much of what is made lies on them.

python -m benchmarks.cases.ring [--seeds 5] [--out benchmarks/results/DATE_ring]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import environment
from gatdist.monitor.grid import encode_png, make_scatter
from gatdist.runs import load_run
from gatdist.storage import Store

MODES, DEVIATION, NUM_SAMPLES = 8, 0.01, 20_000


def main() -> None:
    """Train with each seed, count, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_ring")
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(arguments.seeds):
        settings = [f"run.seed={seed}", *arguments.set]
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(folder, settings)
            seconds = time.perf_counter() - began
            points = generate(folder)
        runs.append({"seed": seed, "seconds": seconds} | quality(points))
        print(runs[-1], flush=True)
        image = make_scatter(points[:4000].double().numpy(), extent=1.5)
        (arguments.out / f"seed-{seed}.png").write_bytes(encode_png(image))
    result = {"settings": arguments.set, "runs": runs, "environment": environment()}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (arguments.out / "result.json").write_text(text + "\n")


def train(folder: str, settings: list[str]) -> None:
    """As a user would, in one process."""
    sets = [word for setting in settings for word in ("--set", setting)]
    command = ["train", "ring", "--local", "--run-dir", folder, *sets]
    subprocess.run(
        [sys.executable, "-m", "gatdist.cli", *command], check=True, stdout=subprocess.DEVNULL
    )


def generate(folder: str) -> Tensor:
    """Points of the averaged generator, [n, 2]."""
    trained = load_run(Store(folder), torch.device("cpu"))
    return trained.sampler(0, "ring")(torch.arange(NUM_SAMPLES))


def quality(points: Tensor) -> dict[str, float]:
    """Modes that at least 1 % of the points lie within 3 σ of, and the share of such points."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    distance, mode = torch.cdist(points.float(), centres).min(dim=1)
    near = distance <= 3 * DEVIATION
    shares = torch.bincount(mode[near], minlength=MODES) / len(points)
    return {
        "modes": int((shares > 0.01).sum()),
        "share_within_3_sigma": near.float().mean().item(),
        "smallest_mode": shares.min().item(),
    }


if __name__ == "__main__":
    main()
