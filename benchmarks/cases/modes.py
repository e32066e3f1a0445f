"""Mode coverage: the Stacked MNIST protocol on stacked digits, with several losses at equal budget.

1,000 modes; 26,000 fakes of each generator are classified (Metz et al. 2017; Lin et al. 2018).
Networks, optimizer and number of samples are the same, losses and penalties differ. Baselines:
26,000 real samples, and the accuracy of the classifier on digits that it was not trained on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gatdist
from benchmarks.case import parser, positive, progress, save
from benchmarks.datasets import STACKS, write_stacked_digits
from gatdist.config import DataConfig, EvaluateConfig, load_config
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.evaluation import Evaluation, Evaluator
from gatdist.evaluation.evaluator import DatasetSamples
from gatdist.monitor.previews import preview
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import load_run
from gatdist.storage import Store

NUM_FAKES = 26_000
SHOWN = 64
METRICS = ["modes", "kl", "fid"]
FEATURES = "channel_classifier"
LOSSES: dict[str, list[str]] = {
    "nonsaturating": ["game.loss=nonsaturating"],
    "nonsaturating_r1": [
        "game.loss=nonsaturating",
        "game.penalties.r1={strength=0.3, every_steps=4}",
    ],
    "hinge_spectral_norm": ["game.loss=hinge", 'model.spectral_norm=["discriminator"]'],
    "wasserstein_gp": ["game.loss=wasserstein", "game.penalties.wgan_gp={strength=10.0}"],
    "relativistic_r1_r2": [
        "game.loss=relativistic",
        "game.penalties.r1={strength=0.3, every_steps=4}",
        "game.penalties.r2={strength=0.3, every_steps=4}",
    ],
}
DEVICE = torch.device("cpu")


def main() -> None:
    arguments = parser("modes", __doc__)
    arguments.add_argument("--seeds", type=positive, default=3)
    arguments.add_argument("--samples", type=positive, default=32_000, help="of training, per run")
    arguments.add_argument("--only", action="append", choices=LOSSES, help="a loss; repeatable")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        write_stacked_digits(argparse.Namespace(count=STACKS), Store(data))
        result: dict[str, Any] = {"samples": given.samples, "num_fakes": NUM_FAKES}
        result |= {"losses": LOSSES, "real": baseline(data), "runs": []}
        progress(f"real: {result['real']}")
        # Seeds outside, so that losses share what the machine does meanwhile.
        for seed in range(given.seeds):
            for name in given.only or LOSSES:
                run = Path(folder, f"{name}-{seed}")
                row = {"loss": name, "seed": seed} | measured(run, data, name, seed, given.samples)
                progress(str(row))
                result["runs"].append(row)
                if seed == 0:
                    (given.out / f"{name}.png").write_bytes(shown(run))
                save(given.out, result)


def settings(name: str, data: str, seed: int, samples: int) -> list[str]:
    """Return overrides of the preset digits: smaller networks, without its loss and schedules."""
    player, network = "{learning_rate=5e-4}", "{name='residual', width=16, max_width=32}"
    return [
        *(f"model.generator={network}", f"model.discriminator={network}"),
        *("game.penalties={}", f"data.url={data}", f"run.seed={seed}"),
        *(f"run.total_samples={samples}", f"run.log_every_samples={samples // 4}"),
        f"run.checkpoint_every_samples={samples}",
        *(f"optim.generator={player}", f"optim.discriminator={player}"),
        *("evaluate.every_samples=0", "evaluate.metrics=[]", f"evaluate.features={FEATURES}"),
        *("monitor.tensorboard=false", *LOSSES[name]),
    ]


def measured(run: Path, data: str, name: str, seed: int, samples: int) -> dict[str, Any]:
    began_s = time.monotonic()
    gatdist.train(load_config("digits", settings(name, data, seed, samples)), run, local=True)
    seconds = time.monotonic() - began_s
    found = gatdist.evaluate(run, METRICS, NUM_FAKES)
    metrics = {key: found["metrics"][key] for key in METRICS}
    return {"seconds": round(seconds, 1)} | metrics


def baseline(data: str) -> dict[str, Any]:
    """Measure 26,000 real samples, and the classifier on digits that it has not seen."""
    of_stacks = drawn(open_dataset(DataConfig(url=data)), METRICS, FEATURES)
    of_digits = drawn(open_dataset(DataConfig(url="builtin:digits")), ["modes"])
    return {key: of_stacks.metrics[key] for key in METRICS} | {
        # Of stacks that are held out; their digits occur in others, those of `digits` do not.
        "accuracy_per_digit": of_stacks.protocol["held_out_accuracy"],
        "accuracy_on_new_digits": of_digits.protocol["held_out_accuracy"],
    }


def drawn(dataset: Dataset, metrics: list[str], features: str = "classifier") -> Evaluation:
    """Evaluate 26,000 real samples, drawn independently as fakes are."""
    config = EvaluateConfig(metrics=metrics, features=features, num_samples=NUM_FAKES)
    evaluator = Evaluator(config, dataset, LocalCommunicator(DEVICE), DEVICE)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(dataset.num_samples, (NUM_FAKES,), generator=generator)
    samples = DatasetSamples(dataset, dataset.num_samples)
    return evaluator(lambda positions: samples(numbers[positions]))


def shown(run: Path) -> bytes:
    trained = load_run(Store(str(run)), DEVICE)
    samples = trained.sampler(0, "modes")(torch.arange(SHOWN))
    return preview(trained.sample_format, samples).files()[".png"]()


if __name__ == "__main__":
    main()
