"""Speed of sampling compared with a bare loop, and seconds of an evaluation.

The bare loop draws latents and noise from torch's generator, gatdist by sample number.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

import torch

import gatdist
from benchmarks.case import parser, positive, save
from gatdist.bench.cases import SIZES
from gatdist.bench.reference import with_noise
from gatdist.bench.rounds import TURN_S, interleave, settled, speed, steps_in_a_turn, timed
from gatdist.config import load_config
from gatdist.models import build_networks
from gatdist.runs import Sampler
from gatdist.runs.sampling import CHUNK, chunks_of

SIZES_MADE = ("residual_w32", "dcgan64_w32", "r3gan32", "stylegan2_32", "wavegan4096", "text16")
METRICS = ["fid", "kid", "swd", "precision_recall", "density_coverage", "inception_score"]


def main() -> None:
    arguments = parser("using", __doc__)
    arguments.add_argument("--rounds", type=positive, default=7)
    arguments.add_argument("--num", type=positive, default=10_000, help="evaluated samples")
    given = arguments.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with settled():
        rows = [generation(name, given.rounds) for name in SIZES_MADE]
    torch.set_num_threads(threads)
    save(given.out, {"generation": rows, "evaluation": evaluation(given.num)})


def generation(name: str, rounds: int) -> dict[str, Any]:
    size = SIZES[name]
    config = size.config({})
    generator = build_networks(config, size.shape, 0)[0].eval().requires_grad_(False)
    latent_size = config.model.latent_size
    sampler, network = Sampler(generator, latent_size, 0, 0, "benchmark"), with_noise(generator)

    def sample(batches: int) -> None:
        for _ in chunks_of(sampler, 0, CHUNK * batches, None):
            pass

    @torch.no_grad()
    def bare(batches: int) -> None:
        for _ in range(batches):
            network(torch.randn(CHUNK, latent_size))

    bare(1)
    batches = steps_in_a_turn(timed(partial(bare, 1)).wall, TURN_S)
    ways = {"gatdist": partial(sample, batches), "bare": partial(bare, batches)}
    turns = interleave(list(ways), rounds, lambda way: timed(ways[way]))
    row = {"size": name, **speed(CHUNK * batches, turns["gatdist"], turns["bare"])}
    print(f"{name:14} {row['samples_per_s']:10,.0f}/s  {row['ratio_to_bare']:.3f} of a bare loop")
    return row


def evaluation(num: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GATDIST_CACHE"] = f"{folder}/cache"
        settings = ["run.total_samples=128", "monitor.tensorboard=false", "evaluate.metrics=[]"]
        run = f"{folder}/run"
        gatdist.train(load_config("digits", settings), run, local=True)
        for kept in ("nothing", "classifier and features"):
            for metrics in (["fid", "kid"], METRICS):
                seconds = timed(partial(gatdist.evaluate, run, metrics, num)).wall
                rows.append({"kept": kept, "metrics": metrics, "num": num, "seconds": seconds})
                print(f"{', '.join(metrics)} of {num:,}, {kept} kept before: {seconds:.1f} s")
    return rows


if __name__ == "__main__":
    main()
