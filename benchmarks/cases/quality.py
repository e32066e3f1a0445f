"""Time to quality of every update rule and precision.

Time to quality is the number of samples to ``--goal`` times the real-vs-real (split-half) FID,
times the time per sample. The bare loop needs as many samples as ``alternating``, which computes
the same. Runs that are in the folder already are kept: the command can be resumed.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.case import gatdist_command, parser, positive, save
from gatdist.bench.cases import Case, GatdistCase, layout
from gatdist.bench.reference import adam
from gatdist.bench.rounds import interleave, settled
from gatdist.config import Config, load_config
from gatdist.data.dataset import open_dataset
from gatdist.models import build_networks
from gatdist.training.player import MovingAverage, ema_weight

GOAL = 1.7
EVERY_SAMPLES = {"digits": 6400, "glyphs": 9600, "ring": 25600}
ROUNDS, STEPS_A_ROUND = 9, 12

# Settings that presets change by default.
PLAINEST = ["precision.dtype=float32", "precision.channels_last=false", "game.reuse_fakes=false"]
BFLOAT16 = ["precision.dtype=bfloat16", "precision.channels_last=true"]
WARMED = [f"optim.{p}.learning_rate.warmup=6400" for p in ("generator", "discriminator")]
PLAIN = [f"optim.{p}.name=sgd" for p in ("generator", "discriminator")]
# Learning rates of the two rules that need gradient descent, found with one seed.
RATES = {
    preset: [f"optim.{p}.{setting}" for p in ("generator", "discriminator") for setting in settings]
    for preset, settings in {
        "digits": ["learning_rate.start=0.005", "clip_norm=1.0"],
        "glyphs": ["learning_rate.start=0.005", "clip_norm=1.0"],
        "ring": ["learning_rate.start=0.1"],
    }.items()
}
SETTINGS: dict[str, list[str]] = {
    "alternating": ["game.latents=shared"],
    "alternating_fresh": ["game.latents=fresh"],
    "alternating_kept": ["game.latents=shared", "game.reuse_fakes=true"],
    "alternating_fresh_bfloat16": ["game.latents=fresh", *BFLOAT16],
    "alternating_kept_bfloat16": ["game.latents=shared", "game.reuse_fakes=true", *BFLOAT16],
    "simultaneous": ["game.update_rule=simultaneous"],
    "one_stage": ["game.update_rule=one_stage"],
    "one_stage_bfloat16": ["game.update_rule=one_stage", *BFLOAT16],
    "one_stage_warmed_bfloat16": ["game.update_rule=one_stage", *BFLOAT16, *WARMED],
    "extragradient": ["game.update_rule=extragradient"],
    "optimistic": ["game.update_rule=optimistic"],
    "consensus": ["game.update_rule=consensus", "game.rule_options={strength=0.01}"],
    "competitive": ["game.update_rule=competitive", "game.loss=minimax", *PLAIN],
    "conjugate": ["game.update_rule=conjugate", *PLAIN],
}
# Settings that compute the same bits as another, and are only timed.
SAME_RUNS = {"alternating_kept": "alternating"}


def main() -> None:
    arguments = parser("quality", __doc__)
    arguments.add_argument("--preset", default="digits", choices=sorted(EVERY_SAMPLES))
    arguments.add_argument("--seeds", type=positive, default=5)
    arguments.add_argument("--only", action="append", choices=sorted(SETTINGS))
    arguments.add_argument("--goal", action="append", type=float, help=f"default: {GOAL}")
    arguments.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = arguments.parse_args()
    out = given.out
    if out == arguments.get_default("out"):
        out = out.with_name(f"{out.name}_{given.preset}")
    out.mkdir(parents=True, exist_ok=True)
    names = given.only or list(SETTINGS)
    requested = [(n, seed) for seed in range(given.seeds) for n in names if n not in SAME_RUNS]
    missing = [key for key in requested if key not in recorded(out)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for run in pool.map(lambda key: train(given.preset, key[0], key[1], given.set), missing):
            with (out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(run["name"], run["seed"], [round(x, 2) for _, x in run["ratios"]], flush=True)
    seconds = time_steps(given.preset, names, given.set)
    result = {"preset": given.preset, "set": given.set, "bare_sample_s": seconds["bare"]}
    result["goals"] = [
        {"goal": goal, "settings": summary(recorded(out), names, seconds, goal)}
        for goal in given.goal or [GOAL]
    ]
    save(out, result)
    for reached in result["goals"]:
        print(reached["goal"], *reached["settings"], sep="\n")


def settings_of(preset: str, name: str) -> list[str]:
    plain = PLAIN[0] in SETTINGS[name]
    return [*PLAINEST, *SETTINGS[name], *(RATES[preset] if plain else [])]


def recorded(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    file = out / "runs.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {(run["name"], run["seed"]): run for run in map(json.loads, lines)}


def train(preset: str, name: str, seed: int, more: list[str]) -> dict[str, Any]:
    every = EVERY_SAMPLES[preset]
    settings = [
        f"run.seed={seed}",
        f"run.log_every_samples={every}",
        "run.checkpoint_every_samples=1000000000",
        f"evaluate.every_samples={every}",
        'evaluate.metrics=["fid"]',
        "monitor.tensorboard=false",
        *more,
        *settings_of(preset, name),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", preset, "--local", "--run-dir", folder]
        command = gatdist_command(*words, settings=settings)
        began = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
        metrics = Path(folder) / "metrics.jsonl"  # absent if the run failed early
        lines = metrics.read_text().splitlines() if metrics.exists() else []
    ticks = [json.loads(line) for line in lines]
    return {
        "name": name,
        "seed": seed,
        "settings": settings,
        "status": done.returncode,
        "stderr": done.stderr[-300:] if done.returncode else "",
        "seconds": seconds,
        "ratios": [
            (t["samples_seen"], t["metric/fid_over_real_split"])
            for t in ticks
            if t.get("metric/fid_over_real_split") is not None
        ],
    }


def samples_to_goal(ratios: list[tuple[int, float]], goal: float) -> float:
    """Interpolate, in logarithms, where the ratio first reaches the goal; ∞ if it does not."""
    for (before, high), (after, low) in pairwise(ratios):
        if low <= goal < high:
            share = math.log(high / goal) / math.log(high / low)
            return before + share * (after - before)
    return 0.0 if ratios and ratios[0][1] <= goal else math.inf


def summary(
    runs: dict[tuple[str, int], dict[str, Any]],
    names: list[str],
    seconds: dict[str, float],
    goal: float,
) -> list[dict[str, Any]]:
    """Return a row per setting: means and deviations over seeds, and time relative to bare."""
    rows = []
    bare = None
    for name in names:
        source = SAME_RUNS.get(name, name)
        mine = [run for (which, _), run in sorted(runs.items()) if which == source]
        ratios = [run["ratios"] for run in mine if run["ratios"]]
        reached = [samples_to_goal(run["ratios"], goal) for run in mine]
        finite = [x for x in reached if math.isfinite(x)]
        row: dict[str, Any] = {
            "name": name,
            "seeds": len(mine),
            "halfway": _mean_and_deviation([x[len(x) // 2 - 1][1] for x in ratios]),
            "at_the_end": _mean_and_deviation([x[-1][1] for x in ratios]),
            "reached_the_goal": len(finite),
            "samples_to_goal": _mean_and_deviation(finite),
            "sample_s": seconds[name],
        }
        if finite:
            row["time_to_goal_s"] = statistics.mean(finite) * seconds[name]
            if name == "alternating":
                bare = statistics.mean(finite) * seconds["bare"]
        rows.append(row)
    for row in rows:
        if bare and "time_to_goal_s" in row:
            row["time_over_bare"] = row["time_to_goal_s"] / bare
    return rows


def _mean_and_deviation(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation}


# Time per sample


class BareLoop(Case):
    """Reference loop of the preset: alternating, D frozen, shared latents."""

    def __init__(self, config: Config, shape: tuple[int, ...], labels: Tensor | None) -> None:
        self.config, self.batch, self.labels = config, config.run.global_batch, labels
        classes = 0 if labels is None else int(labels.max()) + 1
        self.generator, self.discriminator = build_networks(config, shape, classes)
        self.g_optimizer = adam(self.generator.parameters(), config.optim.generator)
        self.d_optimizer = adam(self.discriminator.parameters(), config.optim.discriminator)
        self.average = MovingAverage(self.generator)
        self.real = torch.rand(self.batch, *shape) * 2 - 1
        self.steps = 0

    def step(self) -> None:
        """Take a step with the relativistic loss, R1 and R2, as in the presets."""
        latents = torch.randn(self.batch, self.config.model.latent_size)
        with torch.no_grad():
            fakes = self.generator(latents, self.labels)
        due = {
            name: penalty.strength.at(0) * penalty.every_steps
            for name, penalty in self.config.game.penalties.items()
            if self.steps % penalty.every_steps == 0
        }
        self.d_optimizer.zero_grad()
        sides = {
            "r1": self.real.detach().requires_grad_("r1" in due),
            "r2": fakes.requires_grad_("r2" in due),
        }
        logits = {name: self.discriminator(x, self.labels) for name, x in sides.items()}
        loss = softplus(logits["r2"] - logits["r1"]).mean()
        for name, strength in due.items():
            (gradient,) = torch.autograd.grad(logits[name].sum(), sides[name], create_graph=True)
            loss = loss + strength / 2 * gradient.square().flatten(1).sum(1).mean()
        loss.backward()
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)
        with torch.no_grad():
            real = self.discriminator(self.real, self.labels)
        fakes = self.generator(latents, self.labels)
        softplus(real - self.discriminator(fakes, self.labels)).mean().backward()
        self.g_optimizer.step()
        self.discriminator.requires_grad_(True)
        half_life = self.config.game.ema_half_life_samples.at(0)
        self.average.update(self.generator, ema_weight(half_life, self.batch))
        self.steps += 1


def time_steps(preset: str, names: list[str], more: list[str]) -> dict[str, float]:
    torch.set_num_threads(1)
    base = load_config(preset, [*more, *PLAINEST])
    dataset = open_dataset(base.data)
    labels = None
    if base.model.conditional:  # every class is in the batch
        labels = torch.arange(base.run.global_batch) % dataset.num_classes
    cases: dict[str, Case] = {"bare": BareLoop(base, dataset.sample_shape, labels)}
    for name in names:
        config = load_config(preset, [*more, *settings_of(preset, name)])
        real = torch.rand(config.step_samples, *dataset.sample_shape) * 2 - 1
        real = real.contiguous(memory_format=layout(config, real))
        cases[name] = GatdistCase(config, real, labels=labels)
    # The number of steps is a multiple of every penalty's interval.
    with settled():
        turns = interleave(list(cases), ROUNDS, lambda name: cases[name].run(STEPS_A_ROUND).wall)
    samples = STEPS_A_ROUND * base.run.global_batch
    return {name: statistics.median(times) / samples for name, times in turns.items()}


if __name__ == "__main__":
    main()
