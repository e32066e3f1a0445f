"""Seconds from the command to ``gatdist --help`` and to the first step of a run."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.case import gatdist_command, parser, positive, save
from gatdist.bench.rounds import timed

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
TIMEOUT_S = 120.0


def main() -> None:
    arguments = parser("startup", __doc__)
    arguments.add_argument("--times", type=positive, default=5)
    given = arguments.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (HELP, *TRAIN)}
    command, quiet = gatdist_command("--help"), subprocess.DEVNULL
    show_help = partial(subprocess.run, command, check=True, stdout=quiet)
    for number in range(given.times + 1):
        for name, taken in seconds.items():
            taken.append(first_step(TRAIN[name]) if name in TRAIN else timed(show_help).wall)
            print(f"{number or 'warm-up'} {name}: {taken[-1]:.2f} s", flush=True)
    cases = [{"what": name, "seconds": taken[1:]} for name, taken in seconds.items()]
    save(given.out, {"cases": cases, "settings": SETTINGS})


def first_step(how: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "digits", *how, "--run-dir", f"{folder}/run"]
        command = gatdist_command(*words, settings=SETTINGS)
        with Path(folder, "log").open("wb") as log:
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                metrics = Path(folder, "run", "metrics.jsonl")
                while not (metrics.exists() and metrics.stat().st_size):
                    late = time.perf_counter() - began > TIMEOUT_S
                    if late or process.poll() is not None:
                        raise SystemExit(Path(folder, "log").read_text())
                    time.sleep(0.005)
                return time.perf_counter() - began
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()


if __name__ == "__main__":
    main()
