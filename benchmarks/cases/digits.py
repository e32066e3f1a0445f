"""Trains the digits preset from nothing and records configuration, environment, curve and grid.

python -m benchmarks.cases.digits [--workers 2] [--out benchmarks/results/DATE_digits]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment


def main() -> None:
    """Train in a temporary folder, then copy what is worth keeping."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_digits")
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "digits", "--workers", str(arguments.workers), "--run-dir", folder]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gatdist.cli", *command], check=True)
        seconds = time.perf_counter() - began
        record(
            Path(folder),
            arguments.out,
            {"command": " ".join(["gatdist", *command[:-1], "…"]), "seconds": seconds},
        )


def record(run: Path, out: Path, facts: dict[str, Any]) -> None:
    """Copy a finished run's configuration, metrics and last grid to ``out``, and draw its curve."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "config.json", out / "config.json")
    shutil.copy(run / "metrics.jsonl", out / "metrics.jsonl")
    shutil.copy(max(run.glob("samples/fakes-*.png")), out / "grid.png")
    shutil.copy(run / "samples/reals.png", out / "reals.png")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {key: value for key, value in lines[-1].items() if key.startswith("metric/")}
    result = facts | {
        "samples_seen": lines[-1]["samples_seen"],
        "metrics": measured,
        "environment": environment(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    draw(lines, out / "curve.png")


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Losses, gradient norms and FID over samples seen."""
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
    scored = [x for x in lines if "metric/fid" in x]
    axes[2].plot(
        [x["samples_seen"] for x in scored],
        [x["metric/fid"] for x in scored],
        "o-",
        label="generated",
    )
    axes[2].axhline(
        scored[-1]["metric/fid_halves"],
        color="grey",
        linestyle="--",
        label="two halves of the real data",
    )
    axes[2].set(title="FID", xlabel="samples seen", yscale="log")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
