"""Real runs: recovery time after a worker failure, and quality by number of workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import chdir
from pathlib import Path
from typing import Any

from gatdist.bench.processes import Report
from gatdist.common.errors import GatdistError
from gatdist.config import Config, load_config

# Trains a run and returns its outcome.
Train = Callable[[Config, str], dict[str, Any]]

_PLUGIN = "dies_on_purpose"
_STEPS, _KILL_STEP, _CHECKPOINT_STEPS = 60, 30, 20
# Both files get the time of one file system, so the hosts' clocks need not agree.
_SOURCE = f"""
import os, pathlib, signal
from gatdist.common import position
folder = pathlib.Path(__file__).parent
def hook(place):
    here = position.here
    where = place, here.rank, here.attempt
    if where == ("generator", RANK, 1) and here.step >= {_KILL_STEP}:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if where == ("optimizer", 0, 2):
        (folder / "moves").touch()
        position.hook = None
position.hook = hook
"""


def time_to_recover(workers: int, address: str, folder: Path, train: Train) -> dict[str, Any]:
    """Kill the last of ``workers`` (≥ 2) workers of a small run, and time the recovery.

    ``folder`` is empty, and at the same path on every host.

    Returns:
        ``workers``; ``recovery_s``, from the kill until the gradients of a new step are reduced;
        ``steps_repeated``, from the last checkpoint to the kill.

    Raises:
        GatdistError: Training failed, no worker was killed, or the run did not recover.
    """
    (folder / f"{_PLUGIN}.py").write_text(_SOURCE.replace("RANK", str(workers - 1)))
    batch = 8 * workers
    config = load_config(
        "digits",
        [
            f"run.total_samples={_STEPS * batch}",
            f"run.global_batch={batch}",
            f"run.log_every_samples={_CHECKPOINT_STEPS * batch}",
            f"run.checkpoint_every_samples={_CHECKPOINT_STEPS * batch}",
            'model.generator={name="residual", width=8}',
            'model.discriminator={name="residual", width=8}',
            "evaluate.metrics=[]",
            "evaluate.every_samples=0",
            f'plugins=["{_PLUGIN}"]',
            *_where(workers, address),
        ],
    )
    with chdir(folder):  # where workers look for plugins
        train(config, str(folder / "run"))
    killed, moves = folder / "killed", folder / "moves"
    if not (killed.exists() and moves.exists()):
        raise GatdistError("no worker was killed, or no new step followed")
    attempts = (folder / "run/attempts.jsonl").read_text().splitlines()
    seen = int(json.loads(attempts[1])["resumed_from"] or 0)
    return {
        "workers": workers,
        "recovery_s": moves.stat().st_mtime - killed.stat().st_mtime,
        "steps_repeated": _KILL_STEP - seen // batch,
    }


def quality_config(preset: str, workers: int, address: str) -> Config:
    """Load a preset or a TOML file; ConfigError if it does not suit ``workers``."""
    config = load_config(preset, _where(workers, address))
    config.check_workers(workers)
    return config


def measure_quality(
    configs: Iterable[Config], url: str, train: Train, report: Report
) -> dict[int, dict[str, float]]:
    """Train each configuration in ``url``, a folder that all hosts reach.

    Returns:
        The last metrics and ``samples_seen`` by number of workers.
    """
    found = {}
    for config in configs:
        workers = config.cluster.max_workers
        report(f"quality: a run of {workers} worker{'s' * (workers > 1)}")
        outcome = train(config, f"{url}/quality-{workers}")
        found[workers] = {**outcome["metrics"], "samples_seen": outcome["samples_seen"]}
    return found


def _where(workers: int, address: str) -> list[str]:
    return [f"cluster.workers={workers}", f"cluster.address={json.dumps(address)}"]
