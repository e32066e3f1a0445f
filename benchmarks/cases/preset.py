"""Trains a preset from nothing and records configuration, environment, curves and samples.

python -m benchmarks.cases.preset digits [--workers 2] [--set KEY=VALUE …]
    [--run-dir FOLDER] [--out benchmarks/results/DATE_PRESET]

Beside what the run measures of itself, the same metrics are taken of the generator before its first
step, and of a simple baseline: of pictures their mean (of their class), of sounds real ones with
their frames shuffled, of texts a Markov chain of characters. Several --out folders of the same
preset are several runs. A --run-dir stays, and a run that was begun there goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment
from gatdist.config import Config, load_config
from gatdist.data import Dataset, open_dataset
from gatdist.data.sample_format import TextFormat
from gatdist.evaluation import Evaluator
from gatdist.models import build_networks
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler

FRAME_S = 0.032
SAMPLE_ENDINGS = (".png", ".wav", ".txt")


def main() -> None:
    """Train in a temporary folder, then copy what is worth keeping."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument(
        "--workers", type=int, default=2, help="0 trains in one process, without Ray"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run-dir", help="to train in (default: one that goes afterwards)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(
        f"benchmarks/results/{time.strftime('%Y-%m-%d')}_{arguments.preset}"
    )
    config = load_config(arguments.preset, arguments.set)
    compared = baselines(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.run_dir or temporary
        how = ["--workers", str(arguments.workers)] if arguments.workers else ["--local"]
        sets = [word for setting in arguments.set for word in ("--set", setting)]
        command = ["train", arguments.preset, *how, *sets, "--run-dir", folder]
        subprocess.run([sys.executable, "-m", "gatdist.cli", *command], check=True)
        shown = {"command": " ".join(["gatdist", *command[:-1], "…"])}
        record(Path(folder), out, shown | compared)


def baselines(config: Config) -> dict[str, Any]:
    """The run's metrics of its generator before training, and of a simple baseline."""
    dataset, comm = open_dataset(config.data), LocalCommunicator(torch.device("cpu"))
    asked = [name for name in config.evaluate.metrics if name != "probe"]
    evaluator = Evaluator(
        config.evaluate.model_copy(update={"metrics": asked}),
        dataset,
        comm,
        comm.device,
        conditional=config.model.conditional,
    )
    sample_format = dataset.sample_format
    generator, _ = build_networks(
        config, sample_format.shape, sample_format.num_classes, sample_format.metadata
    )
    classes = sample_format.num_classes if config.model.conditional else 0
    untrained = Sampler(
        generator.float().eval(), config.model.latent_size, classes, config.run.seed, "evaluation"
    )
    simple = {"image": MeanImage, "audio": ShuffledFrames, "text": MarkovChain}[dataset.modality]
    return {
        "untrained": evaluator(untrained).metrics,
        "baseline": simple.__doc__,
        "baseline_metrics": evaluator(simple(dataset)).metrics,
    }


class Baseline:
    """Samples as networks see them, by their numbers."""

    def __init__(self, dataset: Dataset) -> None:
        self.sample_format = dataset.sample_format
        self.samples, self.classes = dataset.read(np.arange(dataset.num_samples))
        self.order = np.random.default_rng(0).permutation(dataset.num_samples)

    def labels(self, positions: Tensor) -> Tensor | None:
        """Those of real samples in a random order."""
        if self.classes is None:
            return None
        return torch.from_numpy(self.classes[self.order[positions.numpy() % len(self.order)]])


class MeanImage(Baseline):
    """The mean of all pictures, or of all of the class."""

    def __call__(self, positions: Tensor) -> Tensor:
        """The same for all of a class."""
        seen = self.sample_format.to_network(torch.from_numpy(self.samples))
        labels = self.labels(positions)
        if labels is None or self.classes is None:
            return seen.mean(dim=0).expand(len(positions), *seen.shape[1:])
        classes = torch.from_numpy(self.classes)
        means = torch.stack([seen[classes == c].mean(dim=0) for c in range(int(classes.max()) + 1)])
        return means[labels]


class ShuffledFrames(Baseline):
    """Real sounds whose frames of 32 ms are shuffled."""

    def __call__(self, positions: Tensor) -> Tensor:
        """Each in an order of its own."""
        length = self.samples.shape[2]
        frame = max(1, int(FRAME_S * self.sample_format.metadata["sample_rate"]))
        starts = np.arange(0, length - frame + 1, frame)
        made = []
        for i in positions.tolist():
            audio = self.samples[self.order[i % len(self.order)]].copy()
            pieces = [audio[:, s : s + frame].copy() for s in starts]
            for start, k in zip(
                starts, np.random.default_rng(i).permutation(len(pieces)), strict=True
            ):
                audio[:, start : start + frame] = pieces[k]
            made.append(audio)
        return torch.from_numpy(np.stack(made))


class MarkovChain(Baseline):
    """A Markov chain of characters of order 1, with the frequencies of the real texts."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        assert isinstance(self.sample_format, TextFormat)
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for ids in self.samples:
            before = 0
            for after in ids.tolist():
                counts[before][after] += 1
                before = after
                if not after:
                    break
        self.next = {
            before: (np.array(list(c)), np.array(list(c.values())) / c.total())
            for before, c in counts.items()
        }

    def __call__(self, positions: Tensor) -> Tensor:
        """Each by a random stream of its own."""
        length = self.samples.shape[1]
        ids = np.zeros((len(positions), length), dtype=np.uint8)
        for row, i in enumerate(positions.tolist()):
            chance, before = np.random.default_rng(i), 0
            for place in range(length):
                choices, shares = self.next[before]
                before = int(chance.choice(choices, p=shares))
                if not before:
                    break
                ids[row, place] = before
        return self.sample_format.to_network(torch.from_numpy(ids))


def record(run: Path, out: Path, metadata: dict[str, Any]) -> None:
    """Copy a finished run's configuration, metrics and last samples to ``out``; draw its curves."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "config.json", out / "config.json")
    shutil.copy(run / "metrics.jsonl", out / "metrics.jsonl")
    for ending in SAMPLE_ENDINGS:
        fakes = sorted(run.glob(f"samples/fakes-*{ending}"))
        if fakes:
            shutil.copy(fakes[-1], out / f"fakes{ending}")
            shutil.copy(run / f"samples/reals{ending}", out / f"reals{ending}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {key: value for key, value in lines[-1].items() if key.startswith("metric/")}
    result = metadata | {
        "samples_seen": lines[-1]["samples_seen"],
        "seconds": lines[-1]["wall_time_s"],  # of training; starting is not among them
        "metrics": measured,
        "environment": environment(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    draw(lines, out / "curve.png", json.loads((out / "config.json").read_text()))


def draw(lines: list[dict[str, Any]], path: Path, config: dict[str, Any]) -> None:
    """Losses, gradient norms and the first metric over samples seen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, family in zip(axes, ("loss", "gradient_norm"), strict=False):
        for player in ("generator", "discriminator"):
            axis.plot(
                [x["samples_seen"] for x in lines],
                [x[f"{family}/{player}"] for x in lines],
                label=player,
            )
        axis.set(title=family.replace("_", " "), xlabel="samples seen")
        axis.legend(frameon=False)
    axes[1].set_yscale("log")
    name = config["evaluate"]["metrics"][0]
    scored = [x for x in lines if f"metric/{name}" in x]
    axes[2].plot(
        [x["samples_seen"] for x in scored],
        [x[f"metric/{name}"] for x in scored],
        "o-",
        label="generated",
    )
    axes[2].axhline(
        scored[-1][f"metric/{name}_real_split"],
        color="grey",
        linestyle="--",
        label="two halves of the real data",
    )
    axes[2].set(title=name.upper(), xlabel="samples seen", yscale="log")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
