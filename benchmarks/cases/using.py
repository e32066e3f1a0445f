"""Using a generator: samples a second beside a bare loop, and what an evaluation takes.

python -m benchmarks.cases.using [--rounds 7] [--num 10000]

Both sides of the first part make the same number of samples by the same network, in the batches of
`gatdist sample`, without gradients, in one thread. The bare loop draws its latents (and what the
network draws for itself) from torch's generator; gatdist draws them by each sample's number. The
second part evaluates an untrained run of the preset ``digits``: from an empty cache folder, then
again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gatdist
from benchmarks.environment import environment
from gatdist.bench.case import SIZES
from gatdist.bench.reference import with_noise
from gatdist.bench.rounds import TURN_S, interleave, settled, speed, steps_in_a_turn
from gatdist.config import load_config
from gatdist.models import build_networks
from gatdist.runs import Sampler
from gatdist.runs.sampling.request import CHUNK, chunks_of

SIZES_MADE = ("residual_w32", "dcgan64_w32", "r3gan32", "stylegan2_32", "wavegan4096", "text16")
METRICS = ["fid", "kid", "swd", "precision_recall", "density_coverage", "inception_score"]


def main() -> None:
    """Measure both parts and write ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num", type=int, default=10_000, help="samples that are evaluated")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_using")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with settled():
        rows = [generation(name, arguments.rounds) for name in SIZES_MADE]
    torch.set_num_threads(threads)
    result = {
        "generation": rows,
        "evaluation": evaluation(arguments.num),
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def generation(name: str, rounds: int) -> dict[str, Any]:
    """Samples a second of one size, and how many times the bare loop's."""
    size = SIZES[name]
    config = size.config({})
    generator = build_networks(config, size.shape, 0)[0].eval().requires_grad_(False)
    latent_size = config.model.latent_size
    sampler, network = Sampler(generator, latent_size, 0, 0, "benchmark"), with_noise(generator)

    def ours(batches: int) -> float:
        began = time.perf_counter()
        for _ in chunks_of(sampler, 0, CHUNK * batches, None):
            pass
        return time.perf_counter() - began

    @torch.no_grad()
    def bare(batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches):
            network(torch.randn(CHUNK, latent_size))
        return time.perf_counter() - began

    bare(1)
    batches = steps_in_a_turn(1, bare(1), TURN_S)
    ways = {"ours": ours, "bare": bare}
    seconds = interleave(list(ways), rounds, lambda way: ways[way](batches), lambda text: None)
    row = {"size": name, **speed(CHUNK * batches, seconds["ours"], seconds["bare"])}
    print(f"{name:14} {row['samples_per_s']:10,.0f}/s  {row['ratio_to_bare']:.3f} of a bare loop")
    return row


def evaluation(num: int) -> list[dict[str, Any]]:
    """Seconds that metrics of so many samples take, first and again."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GATDIST_CACHE"] = f"{folder}/cache"
        settings = ["run.total_samples=128", "monitor.tensorboard=false", "evaluate.metrics=[]"]
        run = f"{folder}/run"
        gatdist.train(load_config("digits", settings), run, local=True)
        for kept in ("nothing", "classifier and features"):
            for metrics in (["fid", "kid"], METRICS):
                began = time.perf_counter()
                gatdist.evaluate(run, metrics, num)
                seconds = time.perf_counter() - began
                rows.append({"kept": kept, "metrics": metrics, "num": num, "seconds": seconds})
                print(f"{', '.join(metrics)} of {num:,}, {kept} kept before: {seconds:.1f} s")
    return rows


if __name__ == "__main__":
    main()
