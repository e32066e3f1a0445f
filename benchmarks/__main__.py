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
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("benchmarks/results")
CASES: dict[str, Sequence[str]] = {
    "games": (),
    "ring": (),
    "remedies": (),
    "overlap": (),
    "packing": (),
    "using": (),
    "overheads": (),
    "digits": ("preset", "digits"),
    "digits-conditional": ("preset", "digits-conditional"),
}
# By ``gatdist bench``, whose JSON is the result.
MEASURED: dict[str, Sequence[str]] = {
    "step": ("step", "--two-processes"),
    "data": ("data",),
    "storage": ("storage",),
    "scaling": ("scaling", "--workers", "1,2"),
}
NEEDS_ROOT = {"recovery": (), "soak": ()}  # they make hosts in network namespaces
LONG = {
    "soak",
    "quality",
    "fuzz",
    "speech",
    "words",
    "glyphs-r3gan",
    "glyphs-stylegan2",
}


def main() -> int:
    """Run them; 0 if all went well."""
    known = [*CASES, *MEASURED, *NEEDS_ROOT, *sorted(LONG - NEEDS_ROOT.keys())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or [name for name in known if name not in LONG]
    for name in names:
        if name not in known:
            parser.error(f"{name}: not known; there are {', '.join(known)}")
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
    """The status of one."""
    if name in MEASURED:
        out = RESULTS / f"{time.strftime('%Y-%m-%d')}_{name}"
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "gatdist.cli", "bench", *MEASURED[name], "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if not done.returncode:
            (out / "result.json").write_bytes(done.stdout)
        return done.returncode
    case = Path(__file__).parent / "cases" / f"{name}.py"
    module, *arguments = CASES.get(name) or ((name,) if case.exists() else ("preset", name))
    command = [sys.executable, "-m", f"benchmarks.cases.{module}", *arguments]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
