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
from gatdist.runs import read_lines
from gatdist.runs.changes import CHANGES_FILE
from gatdist.storage import Store

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
    if (place, here.rank, here.step) == ("generator", RANK, {_KILL_STEP}):
        try:
            (folder / "killed").touch(exist_ok=False)
        except FileExistsError:
            return  # a replacement
        os.kill(os.getpid(), signal.SIGKILL)
    if (place, here.rank) == ("optimizer", 0) and here.step > {_KILL_STEP}:
        (folder / "moves").touch()
        position.hook = None
position.hook = hook
"""


def time_to_recover(workers: int, address: str, folder: Path, train: Train) -> dict[str, Any]:
    """Kill the last of ``workers`` (≥ 2) workers of small runs, and time the recovery.

    ``folder`` is empty, and at the same path on every host.

    Returns:
        ``workers``; ``recovery_s``, from the kill until the gradients of a new step are reduced, of
        a run of a fixed size; ``elastic_s``, the same of one that may do without a worker;
        ``steps_repeated`` by the first.

    Raises:
        GatdistError: Training failed, no worker was killed, or the run did not recover.
    """
    fixed, elastic = (
        _recovery(workers, sizes, address, folder / name, train)
        for name, sizes in {"fixed": f"{workers}", "elastic": f"[{workers - 1},{workers}]"}.items()
    )
    return {
        "workers": workers,
        "recovery_s": fixed[0],
        "elastic_s": elastic[0],
        "steps_repeated": fixed[1],
    }


def _recovery(
    workers: int, sizes: str, address: str, folder: Path, train: Train
) -> tuple[float, int]:
    """Return the seconds of recovery and the repeated steps of a run."""
    folder.mkdir()
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
            *_where(sizes, address),
        ],
    )
    with chdir(folder):  # where workers look for plugins
        train(config, str(folder / "run"))
    killed, moves = folder / "killed", folder / "moves"
    if not (killed.exists() and moves.exists()):
        raise GatdistError("no worker was killed, or no new step followed")
    store = Store(str(folder / "run"))
    repeated = sum(line["steps_undone"] for line in read_lines(store, CHANGES_FILE))
    for start in read_lines(store, "attempts.jsonl")[1:]:
        repeated += _KILL_STEP - int(start["resumed_from"] or 0) // batch
    return moves.stat().st_mtime - killed.stat().st_mtime, repeated


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


def _where(workers: int | str, address: str) -> list[str]:
    return [f"cluster.workers={workers}", f"cluster.address={json.dumps(address)}"]
