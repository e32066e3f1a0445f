"""Runs what this machine can, one after the other: ``python -m benchmarks [NAME …]``.

Each writes ``benchmarks/results/<date>_<name>``; at the end a table tells what came of each.
Without names all run, which takes hours: those of ``LONG`` only when they are named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path("benchmarks/results")
OWN = (
    "games",
    "ring",
    "remedies",
    "overlap",
    "packing",
    "using",
    "overheads",
    "recovery",
    "soak",
    "simulation",
    "fuzz",
    "quality",
)
PRESETS = ("digits", "digits-conditional", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2")
# The module that each runs as, and its arguments; in this order.
CASES: dict[str, tuple[str, ...]] = {
    **{name: (f"benchmarks.cases.{name}",) for name in OWN},
    **{name: ("benchmarks.cases.preset", name) for name in PRESETS},
    "step": ("gatdist.cli", "bench", "step", "--two-processes", "--json"),
    "data": ("gatdist.cli", "bench", "data", "--json"),
    "storage": ("gatdist.cli", "bench", "storage", "--json"),
    "scaling": ("gatdist.cli", "bench", "scaling", "--workers", "1,2", "--json"),
}
NEEDS_ROOT = {"recovery", "soak"}  # they make hosts in network namespaces
LONG = {"soak", "fuzz", "quality", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2"}


def main() -> int:
    """Run them; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    names = parser.parse_args().names or [name for name in CASES if name not in LONG]
    for name in names:
        if name not in CASES:
            parser.error(f"{name}: not known; there are {', '.join(CASES)}")
    rows = []
    for name in names:
        if name in NEEDS_ROOT and os.geteuid():
            rows.append((name, "left out: needs root", 0.0))
            continue
        print(f"== {name}", flush=True)
        began = time.monotonic()
        status = run(name)
        ended = "done" if not status else f"failed with status {status}"
        rows.append((name, ended, time.monotonic() - began))
    print()
    for name, ended, seconds in rows:
        print(f"{name:20} {ended:24} {seconds:8.0f} s")
    return int(any(ended.startswith("failed") for _, ended, _ in rows))


def run(name: str) -> int:
    """The status of one. What prints JSON has it written down for it."""
    command = [sys.executable, "-m", *CASES[name]]
    if "--json" not in command:
        return subprocess.run(command, check=False).returncode
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if not done.returncode:
        out = RESULTS / f"{time.strftime('%Y-%m-%d')}_{name}"
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_bytes(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
