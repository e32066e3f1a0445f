"""Runs that go wrong in the ways the field knows, each beside the same run with the fix.

python -m benchmarks.cases.remedies [--out benchmarks/results/DATE_remedies]

Every pair differs in the one setting that its title names.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from gatdist.common.errors import TrainingError
from gatdist.config import load_config
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
    """A trouble and its remedy.

    Attributes:
        title: for people.
        labels: of the run that goes wrong, and of its twin.
        tag: the metric that shows it.
        both: settings of both runs.
        trouble: of the one that goes wrong.
        remedy: of the other.
    """

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
    """Run all pairs, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_remedies")
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
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
    text = json.dumps(result | {"environment": environment()}, ensure_ascii=False)
    (out / "result.json").write_text(text + "\n")
    draw(curves, out / "remedies.png")


def curve(settings: list[str], tag: str) -> list[tuple[int, float]]:
    """(samples seen, value of ``tag``) at each tick of a run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(
                load_config("digits", settings),
                LocalCommunicator(torch.device("cpu")),
                Store(folder),
            )
        except TrainingError as error:
            print(error)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ticks: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = [(t["samples_seen"], t[tag]) for t in ticks if t.get(tag) is not None]
    print(settings[len(COMMON) :], "→", [f"{value:.2g}" for _, value in found[:: len(found) // 8]])
    return found


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """One panel a pair."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained"
    )
    for axis, (name, pair) in zip(axes, curves.items(), strict=True):
        colors = ("tab:red", "tab:green")
        for points, label, color in zip(pair.values(), PAIRS[name].labels, colors, strict=True):
            axis.semilogy(*zip(*points, strict=True), color=color, label=label)
        axis.set(title=PAIRS[name].title, xlabel="samples seen", ylabel=PAIRS[name].tag)
        axis.title.set_fontsize(9)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
