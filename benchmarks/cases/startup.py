"""How long one waits: for help, and for the first step of a run.

python -m benchmarks.cases.startup [--times 5] [--out benchmarks/results/DATE_startup]

Each command in turn, round by round: ``gatdist --help``; ``train digits --local``; ``train digits
--workers 2`` with a Ray of its own. A first step is there when the run's first tick, which is
one step long, is on disk. Data and features are in the cache; a round before fills it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

HELP = "`gatdist --help`"
TRAIN = {
    "`gatdist train --local`: first step": ["--local"],
    "`gatdist train --workers 2`: first step": ["--workers", "2"],
}
BATCH = 64
SETTINGS = [
    f"run.total_samples={10**9}",
    f"run.global_batch={BATCH}",
    f"run.log_every_samples={BATCH}",
    "evaluate.metrics=[]",
]
PATIENCE_S = 120.0


def main() -> None:
    """Start, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_startup")
    )
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (HELP, *TRAIN)}
    for number in range(arguments.times + 1):
        for name, taken in seconds.items():
            taken.append(first_step(TRAIN[name]) if name in TRAIN else helped())
            print(f"{number or 'warming up'} {name}: {taken[-1]:.2f} s", flush=True)
    result: dict[str, Any] = {
        "cases": [{"what": name, "seconds": taken[1:]} for name, taken in seconds.items()],
        "settings": SETTINGS,
        "environment": environment(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (arguments.out / "result.json").write_text(text)


def helped() -> float:
    """Seconds of ``gatdist --help``."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "gatdist.cli", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(how: list[str]) -> float:
    """Seconds until a run has made a step; it is stopped then."""
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "digits", *how, *sets, "--run-dir", f"{folder}/run"]
        with Path(folder, "log").open("wb") as log:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "gatdist.cli", *command], stdout=log, stderr=log
            )
            try:
                metrics = Path(folder, "run", "metrics.jsonl")
                while not (metrics.exists() and metrics.stat().st_size):
                    late = time.perf_counter() - began > PATIENCE_S
                    if late or process.poll() is not None:
                        raise SystemExit(Path(folder, "log").read_text())
                    time.sleep(0.005)
                return time.perf_counter() - began
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()


if __name__ == "__main__":
    main()
