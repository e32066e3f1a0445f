"""Training of a preset: configuration, curves, samples, and metrics compared with baselines.

Baselines: the untrained generator, and the mean image (per class), real audio with shuffled frames,
or a Markov chain of characters. A run that exists in ``--run-dir`` is resumed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import RESULTS, gatdist_command, parser, save
from gatdist.config import Config, load_config
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.sample_format import TextFormat
from gatdist.evaluation import Evaluator
from gatdist.models import build_networks
from gatdist.monitor.figures import figure
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler

FRAME_S = 0.032
SAMPLE_ENDINGS = (".png", ".wav", ".txt")


def main() -> None:
    arguments = parser("preset", __doc__)
    arguments.add_argument("preset")
    arguments.add_argument("--workers", type=int, default=2, help="0: one process without Ray")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments.add_argument("--run-dir", help="default: a temporary one")
    given = arguments.parse_args()
    out = given.out
    if out == arguments.get_default("out"):
        out = RESULTS / out.name.replace("preset", given.preset)
    config = load_config(given.preset, given.set)
    compared = baselines(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.run_dir or temporary
        how = ["--workers", str(given.workers)] if given.workers else ["--local"]
        words = ["train", given.preset, *how]
        command = gatdist_command(*words, "--run-dir", folder, settings=given.set)
        subprocess.run(command, check=True)
        sets = [word for setting in given.set for word in ("--set", setting)]
        shown = {"command": " ".join(["gatdist", *words, *sets, "--run-dir", "…"])}
        record(Path(folder), out, shown | compared)


def baselines(config: Config) -> dict[str, Any]:
    dataset, comm = open_dataset(config.data), LocalCommunicator(torch.device("cpu"))
    metrics = [name for name in config.evaluate.metrics if name != "probe"]
    evaluator = Evaluator(
        config.evaluate.model_copy(update={"metrics": metrics}),
        dataset,
        comm,
        comm.device,
        conditional=config.model.conditional,
    )
    sample_format = dataset.sample_format
    generator, _ = build_networks(
        config, sample_format.shape, sample_format.num_classes, sample_format.metadata
    )
    untrained = Sampler.from_config(
        config, generator.float().eval(), sample_format.num_classes, "evaluation"
    )
    simple = {"image": MeanImage, "audio": ShuffledFrames, "text": MarkovChain}[dataset.modality]
    return {
        "untrained": evaluator(untrained).metrics,
        "baseline": simple.__doc__,
        "baseline_metrics": evaluator(simple(dataset)).metrics,
    }


class Baseline:
    def __init__(self, dataset: Dataset) -> None:
        self.sample_format = dataset.sample_format
        self.samples, self.classes = dataset.read(np.arange(dataset.num_samples))
        self.order = np.random.default_rng(0).permutation(dataset.num_samples)

    def labels(self, positions: Tensor) -> Tensor | None:
        if self.classes is None:
            return None
        return torch.from_numpy(self.classes[self.order[positions.numpy() % len(self.order)]])

    def __call__(self, positions: Tensor) -> Tensor:
        raise NotImplementedError


class MeanImage(Baseline):
    """The mean of all images, or of those of the class."""

    def __call__(self, positions: Tensor) -> Tensor:
        seen = self.sample_format.to_network(torch.from_numpy(self.samples))
        labels = self.labels(positions)
        if labels is None or self.classes is None:
            return seen.mean(dim=0).expand(len(positions), *seen.shape[1:])
        classes = torch.from_numpy(self.classes)
        means = torch.stack([seen[classes == c].mean(dim=0) for c in range(int(classes.max()) + 1)])
        return means[labels]


class ShuffledFrames(Baseline):
    """Real audio with shuffled frames of 32 ms."""

    def __call__(self, positions: Tensor) -> Tensor:
        length = self.samples.shape[2]
        frame = max(1, int(FRAME_S * self.sample_format.metadata["sample_rate"]))
        starts = np.arange(0, length - frame + 1, frame)
        made = []
        for i in positions.tolist():
            audio = self.samples[self.order[i % len(self.order)]].copy()
            order = np.random.default_rng(i).permutation(len(starts))
            frames = [audio[:, starts[k] : starts[k] + frame].copy() for k in order]
            for start, shuffled in zip(starts, frames, strict=True):
                audio[:, start : start + frame] = shuffled
            made.append(audio)
        return torch.from_numpy(np.stack(made))


class MarkovChain(Baseline):
    """A Markov chain of characters of order 1, with the frequencies of the data."""

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
        "seconds": lines[-1]["wall_time_s"],  # of training, without the start
        "metrics": measured,
    }
    save(out, result)
    draw(lines, out / "curve.png", json.loads((out / "config.json").read_text()))


def draw(lines: list[dict[str, Any]], path: Path, config: dict[str, Any]) -> None:
    name = config["evaluate"]["metrics"][0]
    scored = [x for x in lines if f"metric/{name}" in x]

    def plot(axis: Any, rows: list[dict[str, Any]], tag: str, style: str, label: str) -> None:
        axis.plot([x["samples_seen"] for x in rows], [x[tag] for x in rows], style, label=label)

    with figure(12, 3.2) as made:
        axes = made.subplots(1, 3)
        for axis, family in zip(axes, ("loss", "gradient_norm"), strict=False):
            for player in ("generator", "discriminator"):
                plot(axis, lines, f"{family}/{player}", "-", player)
            axis.set(title=family.replace("_", " "))
        axes[1].set_yscale("log")
        plot(axes[2], scored, f"metric/{name}", "o-", "generated")
        split = scored[-1][f"metric/{name}_real_split"]
        axes[2].axhline(split, color="grey", linestyle="--", label="real-vs-real (split-half)")
        axes[2].set(title=name.upper(), yscale="log")
        for axis in axes:
            axis.set_xlabel("samples seen")
            axis.legend(frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
