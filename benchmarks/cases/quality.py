"""Time to quality: what each update rule and precision reaches, and how soon.

python -m benchmarks.cases.quality --preset digits [--seeds 5] [--only NAME]... [--goal 1.7]

Every setting trains the preset with each seed, one thread a run, as many runs at once as there are
cores, and is measured every ``EVERY_SAMPLES`` samples. Afterwards, with nothing else running, the
settings' steps and the bare loop's are timed in interleaved rounds. Time to quality is samples
to ``--goal`` times the FID between halves of the real data, times the time of a sample.

The bare loop plays ``alternating`` with shared latents, which is tested to be the same mathematics,
so it needs that setting's samples at the bare loop's speed. Runs that are in the folder already are
not made again: the command can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.environment import environment
from gatdist.bench.case import adam
from gatdist.config import Config, load_config
from gatdist.data import open_dataset
from gatdist.models import build_networks
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.player import MovingAverage
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

GOAL = 1.7
EVERY_SAMPLES = {"digits": 6400, "glyphs": 9600, "ring": 25600}
ROUNDS, STEPS_A_ROUND = 9, 12
CPU = torch.device("cpu")

# Presets come with what pays for them; the study begins with what is plain.
PLAINEST = ["precision.dtype=float32", "precision.channels_last=false", "game.reuse_fakes=false"]
BFLOAT16 = ["precision.dtype=bfloat16", "precision.channels_last=true"]
WARMED = [f"optim.{p}.warmup_samples=6400" for p in ("generator", "discriminator")]
PLAIN = [f"optim.{p}.name=sgd" for p in ("generator", "discriminator")]
# The two rules that need plain gradient descent have rates of their own, found with one seed.
RATES = {
    preset: [f"optim.{p}.{setting}" for p in ("generator", "discriminator") for setting in settings]
    for preset, settings in {
        "digits": ["learning_rate=0.005", "clip_norm=1.0"],
        "glyphs": ["learning_rate=0.005", "clip_norm=1.0"],
        "ring": ["learning_rate=0.1"],
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
# Settings that are the same numbers bit for bit as another's, and are only timed.
SAME_RUNS = {"alternating_kept": "alternating"}


def main() -> None:
    """Train what is missing, time, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits", choices=sorted(EVERY_SAMPLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="NAME", choices=sorted(SETTINGS))
    parser.add_argument(
        "--goal",
        action="append",
        type=float,
        metavar="RATIO",
        help=f"may be given often; default: {GOAL}",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(
        f"benchmarks/results/{time.strftime('%Y-%m-%d')}_quality_{arguments.preset}"
    )
    out.mkdir(parents=True, exist_ok=True)
    names = arguments.only or list(SETTINGS)
    requested = [(n, seed) for seed in range(arguments.seeds) for n in names if n not in SAME_RUNS]
    found = recorded(out)
    missing = [key for key in requested if key not in found]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for run in pool.map(lambda key: train(arguments.preset, *key, arguments.set), missing):
            with (out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(run["name"], run["seed"], [round(x, 2) for _, x in run["ratios"]], flush=True)
    seconds = time_steps(arguments.preset, names, arguments.set)
    result = {"preset": arguments.preset, "set": arguments.set, "bare_sample_s": seconds["bare"]}
    result["goals"] = [
        {"goal": goal, "settings": summary(recorded(out), names, seconds, goal)}
        for goal in arguments.goal or [GOAL]
    ]
    text = json.dumps(result | {"environment": environment()}, indent=1, ensure_ascii=False)
    (out / "result.json").write_text(text + "\n")
    for reached in result["goals"]:
        print(reached["goal"], *reached["settings"], sep="\n")


def settings_of(preset: str, name: str) -> list[str]:
    """What makes a preset a setting of the study."""
    plain = PLAIN[0] in SETTINGS[name]
    return [*PLAINEST, *SETTINGS[name], *(RATES[preset] if plain else [])]


def recorded(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs made so far, by setting and seed."""
    file = out / "runs.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {(run["name"], run["seed"]): run for run in map(json.loads, lines)}


def train(preset: str, name: str, seed: int, more: list[str]) -> dict[str, Any]:
    """One run by the real command; the ratio of its FID to that of the halves, over samples."""
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
    sets = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gatdist.cli", "train", preset, "--local"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--run-dir", folder, *sets],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        metrics = Path(folder) / "metrics.jsonl"  # absent if the run failed before its first tick
        lines = metrics.read_text().splitlines() if metrics.exists() else []
    ticks = [json.loads(line) for line in lines]
    return {
        "name": name,
        "seed": seed,
        "settings": settings,
        "status": done.returncode,
        "told": done.stderr[-300:] if done.returncode else "",
        "seconds": time.perf_counter() - began,
        "ratios": [
            (t["samples_seen"], t["metric/fid_over_real_split"])
            for t in ticks
            if t.get("metric/fid_over_real_split") is not None
        ],
    }


def samples_to_goal(ratios: list[tuple[int, float]], goal: float) -> float:
    """Where the line between two measurements, in logarithms, first crosses the goal; or ∞."""
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
    """A row a setting: means and deviations over its seeds, and time against the bare loop."""
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


# How long a sample takes


def num_classes(labels: Tensor | None) -> int:
    """As many as there are labels; 0 for none."""
    return 0 if labels is None else int(labels.max()) + 1


class BareLoop:
    """The preset's game as one writes it by hand: alternating, D frozen, shared latents."""

    def __init__(self, config: Config, shape: tuple[int, ...], labels: Tensor | None) -> None:
        self.config, self.batch, self.labels = config, config.run.global_batch, labels
        self.generator, self.discriminator = build_networks(config, shape, num_classes(labels))
        self.g_optimizer = adam(self.generator.parameters(), config.optim.generator)
        self.d_optimizer = adam(self.discriminator.parameters(), config.optim.discriminator)
        self.average = MovingAverage(self.generator, config.game.ema_half_life_samples)
        self.real = torch.rand(self.batch, *shape) * 2 - 1
        self.steps = 0

    def step(self) -> None:
        """The relativistic loss with R1 and R2, as both presets have it."""
        latents = torch.randn(self.batch, self.config.model.latent_size)
        with torch.no_grad():
            fakes = self.generator(latents, self.labels)
        due = {
            name: penalty.strength * penalty.every_steps
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
        self.average.update(self.generator, self.batch)
        self.steps += 1


class GatdistCase:
    """A setting's step on made-up data."""

    def __init__(self, config: Config, shape: tuple[int, ...], labels: Tensor | None) -> None:
        self.config, self.labels = config, labels
        self.state = TrainState(config, LocalCommunicator(CPU), shape, num_classes(labels))
        self.rule = self.state.rule(config)
        real = torch.rand(config.step_samples, *shape) * 2 - 1
        last = config.precision.channels_last and real.dim() == 4
        layout = torch.channels_last if last else torch.contiguous_format
        self.real = real.contiguous(memory_format=layout)
        self.statistics, self.timer = Statistics(CPU), PhaseTimer(CPU)

    def step(self) -> None:
        """As the loop takes it."""
        seen, count = self.state.samples_seen, self.config.step_samples
        batch = Batch(self.real, self.labels, torch.arange(count) + seen, seen // count)
        train_step(self.state, self.rule, batch, self.config, self.statistics, self.timer)


def time_steps(preset: str, names: list[str], more: list[str]) -> dict[str, float]:
    """Seconds a sample takes, the median of interleaved rounds, for ``names`` and ``bare``."""
    torch.set_num_threads(1)
    base = load_config(preset, [*more, *PLAINEST])
    dataset = open_dataset(base.data)
    labels = None
    if base.model.conditional:  # every class comes, whatever the batch
        labels = torch.arange(base.run.global_batch) % dataset.num_classes
    cases: dict[str, Any] = {"bare": BareLoop(base, dataset.sample_shape, labels)}
    for name in names:
        config = load_config(preset, [*more, *settings_of(preset, name)])
        cases[name] = GatdistCase(config, dataset.sample_shape, labels)
    found: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(sorted(cases), len(cases)):
            case = cases[name]
            case.step()
            began = time.perf_counter()
            for _ in range(STEPS_A_ROUND):  # a multiple of every penalty's interval
                case.step()
            found[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
    batch = base.run.global_batch
    return {name: statistics.median(times) / batch for name, times in found.items()}


if __name__ == "__main__":
    main()
