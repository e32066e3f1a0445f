"""Runs with exploding or vanishing gradients, each compared with the same run with the fix."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import parser, save
from gatdist.common.errors import TrainingError
from gatdist.config import load_config
from gatdist.monitor.figures import figure
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.loop import run

COMMON = [
    "run.total_samples=25600",
    "run.log_every_samples=640",
    "run.checkpoint_every_samples=1000000",
    'model.generator={name="residual", width=16, max_width=32}',
    'model.discriminator={name="residual", width=16, max_width=32}',
    "evaluate.metrics=[]",
    "evaluate.every_samples=0",
    "monitor.tensorboard=false",
    "health.nonfinite_budget=1000000",
    "game.penalties={}",
]


@dataclass(frozen=True)
class Pair:
    """A problem and its fix; ``tag`` is the metric that shows it, the rest are settings."""

    title: str
    labels: tuple[str, str]
    tag: str
    both: list[str]
    trouble: list[str]
    remedy: list[str]


PAIRS = {
    "exploding": Pair(
        "An unbounded critic explodes",
        ("wasserstein", "wasserstein, wgan_gp"),
        "gradient_norm/generator",
        ["game.loss=wasserstein", "run.total_samples=51200"],
        [],
        ["game.penalties={wgan_gp={strength=10.0}}"],
    ),
    "vanishing": Pair(
        "A discriminator far ahead leaves no gradient",
        ("minimax", "nonsaturating"),
        "gradient_norm/generator",
        [
            "game.num_discriminator_steps=5",
            "run.total_samples=128000",
            "run.log_every_samples=3200",
            "optim.discriminator.learning_rate=2e-3",
            "optim.generator.learning_rate=1e-5",
        ],
        ["game.loss=minimax"],
        ["game.loss=nonsaturating"],
    ),
}


def main() -> None:
    out = parser("remedies", __doc__).parse_args().out
    curves = {
        name: {
            which: curve([*COMMON, *pair.both, *getattr(pair, which)], pair.tag)
            for which in ("trouble", "remedy")
        }
        for name, pair in PAIRS.items()
    }
    result = {
        name: {"title": pair.title, "tag": pair.tag, "both": pair.both}
        | {w: {"settings": getattr(pair, w), "curve": c} for w, c in curves[name].items()}
        for name, pair in PAIRS.items()
    }
    save(out, result, indent=None)
    draw(curves, out / "remedies.png")


def curve(settings: list[str], tag: str) -> list[tuple[int, float]]:
    """Return (samples seen, value of ``tag``) at each log interval of a run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = load_config("digits", settings)
            run(config, LocalCommunicator(torch.device("cpu")), Store(folder))
        except TrainingError as error:
            print(error)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ticks: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = [(t["samples_seen"], t[tag]) for t in ticks if t.get(tag) is not None]
    print(settings[len(COMMON) :], "→", [f"{value:.2g}" for _, value in found[:: len(found) // 8]])
    return found


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    with figure(4 * len(curves), 3.2) as made:
        axes = made.subplots(1, len(curves))
        for axis, (name, pair) in zip(axes, curves.items(), strict=True):
            colors = ("tab:red", "tab:green")
            for points, label, color in zip(pair.values(), PAIRS[name].labels, colors, strict=True):
                axis.semilogy(*zip(*points, strict=True), color=color, label=label)
            axis.set(title=PAIRS[name].title, xlabel="samples seen", ylabel=PAIRS[name].tag)
            axis.title.set_fontsize(9)
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
