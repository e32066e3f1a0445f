"""FID of a batch-normalized generator, live and averaged, by the statistics it is evaluated with.

A small SNGAN on digits of 16 × 16 is trained once per seed; training does not depend on
``game.ema_batch_norm``. Every checkpoint is then evaluated with each kind of statistics.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatdist
from benchmarks.case import parser, positive, save
from gatdist.config import Config, load_config
from gatdist.data.dataset import open_dataset
from gatdist.evaluation import Evaluator
from gatdist.models.buffers import batch_norms, running_statistics
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler, read_checkpoint
from gatdist.runs.trained import networks_with
from gatdist.storage import Store
from gatdist.training.batch_norm import recompute

COMM = LocalCommunicator(torch.device("cpu"))
SETTINGS = [
    "data.resolution=16",
    "run.total_samples=64000",
    "run.checkpoint_every_samples=16000",
    "run.keep_checkpoints=100",
    'model.generator={name="sngan", width=32}',
    'model.discriminator={name="sngan", width=32}',
    'model.spectral_norm=["discriminator"]',
    "game.loss=hinge",
    "game.penalties={}",
    "game.ema_half_life_samples=10000",
    "optim.generator={learning_rate=2e-4, betas=[0.0, 0.9]}",
    "optim.discriminator={learning_rate=4e-4, betas=[0.0, 0.9]}",
    'evaluate.metrics=["fid"]',
    "evaluate.every_samples=0",
    "monitor.tensorboard=false",
]


def main() -> None:
    arguments = parser("batch_norm", __doc__)
    arguments.add_argument("--seeds", type=positive, default=2)
    arguments.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        config = load_config("digits", [*SETTINGS, *given.set, f"run.seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            gatdist.train(config, folder, local=True)
            for row in measured(config, Path(folder)):
                rows.append({"seed": seed, **row})
                print(rows[-1], flush=True)
    last = max(row["samples_seen"] for row in rows)
    ends = [row["ratio"] for row in rows if row["samples_seen"] == last]
    median = {kind: statistics.median(end[kind] for end in ends) for kind in ends[0]}
    save(given.out, {"settings": SETTINGS + given.set, "median_ratio": median, "rows": rows})
    print(median)


def measured(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield FIDs, divided by that between two halves of the real data, of each checkpoint."""
    dataset = open_dataset(config.data)
    evaluator = Evaluator(config.evaluate, dataset, COMM, COMM.device)
    store = Store(str(folder)).child("checkpoints")
    for name in sorted(path.name for path in (folder / "checkpoints").iterdir()):
        checkpoint = read_checkpoint(store.child(name))
        average, _ = networks_with(
            config,
            dataset.sample_format,
            {"generator": checkpoint.weights("generator")},
            name,
        )
        live = copy.deepcopy(average)
        live.load_state_dict(part(checkpoint.tensors, "generator"))
        ratio = {}
        for kind, network in variants(config, average, live).items():
            sampler = Sampler.from_config(config, network, dataset.num_classes, "evaluation")
            ratio[kind] = evaluator(sampler).metrics["fid_over_real_split"]
        yield {"samples_seen": checkpoint.state["samples_seen"], "ratio": ratio}


def part(tensors: Any, name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}


def variants(config: Config, average: nn.Module, live: nn.Module) -> dict[str, nn.Module]:
    """The live generator and the average, with each kind of statistics."""
    found = {"live generator": live, "average, averaged": average}
    for kind in ("live", "recomputed"):
        network = found[f"average, {kind}"] = copy.deepcopy(average)
        if kind == "live":
            for mine, theirs in zip(batch_norms(network), batch_norms(live), strict=True):
                for tensor, value in zip(
                    running_statistics(mine), running_statistics(theirs), strict=True
                ):
                    tensor.copy_(value)
        else:
            sampler = Sampler.from_config(config, network, 0, "batch_norm")
            recompute(sampler, config.generator_batch, COMM)
    network = found["live generator, recomputed"] = copy.deepcopy(live)
    recompute(Sampler.from_config(config, network, 0, "batch_norm"), config.generator_batch, COMM)
    return found


if __name__ == "__main__":
    main()
