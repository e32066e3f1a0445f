"""The ring preset with several seeds: number of modes, and share of samples that lie on them."""

from __future__ import annotations

import math
import subprocess
import tempfile
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import gatdist_command, parser, positive, save
from gatdist.bench.rounds import timed
from gatdist.monitor.grid import encode_png, make_scatter
from gatdist.runs import load_run
from gatdist.storage import Store

MODES, DEVIATION, NUM_SAMPLES = 8, 0.01, 20_000


def main() -> None:
    arguments = parser("ring", __doc__)
    arguments.add_argument("--seeds", type=positive, default=5)
    arguments.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(given.seeds):
        settings = [f"run.seed={seed}", *given.set]
        with tempfile.TemporaryDirectory() as folder:
            seconds = timed(partial(train, folder, settings)).wall
            points = generate(folder)
        runs.append({"seed": seed, "seconds": seconds} | quality(points))
        print(runs[-1], flush=True)
        image = make_scatter(points[:4000].double().numpy(), extent=1.5)
        (given.out / f"seed-{seed}.png").write_bytes(encode_png(image))
    save(given.out, {"settings": given.set, "runs": runs})


def train(folder: str, settings: list[str]) -> None:
    command = gatdist_command("train", "ring", "--local", "--run-dir", folder, settings=settings)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def generate(folder: str) -> Tensor:
    trained = load_run(Store(folder), torch.device("cpu"))
    return trained.sampler(0, "ring")(torch.arange(NUM_SAMPLES))


def quality(points: Tensor) -> dict[str, float]:
    """Count modes with at least 1 % of the points within 3 σ, and the share of such points."""
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
