"""Run benchmarks: ``python -m benchmarks [NAME …]``, or one with its own options.

Each writes ``benchmarks/results/DATE_NAME``. Without names, all run except those of ``LONG``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import plots
from benchmarks.case import RESULTS, gatdist_command
from benchmarks.records import Record

NAMES = (
    *("games", "ring", "modes", "batch_norm", "overlap", "using", "startup", "cores"),
    *("recovery", "after_loss", "undo", "soak", "simulation", "fuzz", "data", "clips", "storage"),
    *("conditional", "scale", "many_workers"),
)
PRESETS = ("digits", "digits-conditional", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2")
# Settings and goals that an hour of glyphs can distinguish.
_SETTINGS = (
    *("alternating", "alternating_fresh_bfloat16", "alternating_kept_bfloat16", "simultaneous"),
    *("one_stage", "one_stage_warmed_bfloat16", "extragradient", "optimistic"),
)
_GLYPHS = ["--preset", "glyphs", "--goal", "1.7", "--goal", "2.5", "--goal", "4"]
_GLYPHS += [word for name in _SETTINGS for word in ("--only", name)]


def _case(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.cases.{name}", *arguments]


# Commands, in order. Those of gatdist have no record of their own, see `run`.
CASES: dict[str, list[str]] = {
    **{name: _case(name) for name in NAMES},
    "gpu": [sys.executable, "-m", "benchmarks.gpu"],
    "quality_digits": _case("quality", "--preset", "digits"),
    "quality_ring": _case("quality", "--preset", "ring"),
    "quality_glyphs": _case("quality", *_GLYPHS),
    **{name: _case("preset", name) for name in PRESETS},
    "step": gatdist_command("bench", "step", "--two-processes"),
    "scaling": gatdist_command("bench", "scaling", "--workers", "1,2"),
}
LONG = {"soak", "fuzz", "modes", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2"}
LONG |= {"quality_digits", "quality_ring", "quality_glyphs"}
# Where `make setup-system` puts it.
NGINX = RESULTS.parents[1] / ".tools/nginx/usr/sbin"
FAILED = "failed with status"


def _no_cuda() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_nginx() -> bool:
    from benchmarks.servers import nginx_program

    return nginx_program() is None


# Requirements, and whether they are missing.
NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    **{
        name: ("root, for hosts in network namespaces", lambda: os.geteuid() != 0)
        for name in ("recovery", "after_loss", "soak")
    },
    "gpu": ("an accelerator", _no_cuda),
    "storage": ("nginx (make setup-system)", _no_nginx),
}


def main() -> int:
    os.environ["PATH"] += f":{NGINX}"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.splitlines()[0],
        epilog="Options after a single NAME go to that benchmark, such as --help.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    name, *words = sys.argv[1:] or [""]
    if name in ("preset", "quality") or (name in CASES and any(w[0] == "-" for w in words)):
        return subprocess.run([*CASES.get(name, _case(name)), *words], check=False).returncode
    names = parser.parse_args().names or [name for name in CASES if name not in LONG]
    for name in names:
        if name not in CASES:
            parser.error(f"{name}: not known; there are {', '.join(CASES)}")
    rows = [attempted(name) for name in names]
    print("\n" + "\n".join(rows))
    return int(any(FAILED in row for row in rows))


def attempted(name: str) -> str:
    what, is_lacking = NEEDS.get(name, ("", lambda: False))
    if is_lacking():
        return f"{name:20} skipped: needs {what}"
    print(f"== {name}", flush=True)
    began = time.monotonic()
    status = run(name)
    head = f"{name:20} {time.monotonic() - began:6.0f} s  "
    return f"{head}{FAILED} {status}" if status else head + summary(name)


def run(name: str) -> int:
    out = RESULTS / f"{time.strftime('%Y-%m-%d')}_{name}"
    if name != "step":
        more = ["--out", str(out)] if name == "scaling" else []
        return subprocess.run([*CASES[name], *more], check=False).returncode
    done = subprocess.run([*CASES[name], "--json"], stdout=subprocess.PIPE, check=False)
    if not done.returncode:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_bytes(done.stdout)
    return done.returncode


def summary(name: str) -> str:
    """Draw the newest record, and return its lines."""
    folders = sorted(RESULTS.glob(f"[0-9]*_{name}"))
    if not folders:
        return "done"
    record = Record(folders[-1], json.loads((folders[-1] / "result.json").read_text()))
    plots.draw(name, record.found, record.folder / f"{name}.png")
    lines = [f"{line.what}: {line.value} ({line.spread})" for line in record.lines()]
    return f"done: {record.folder}" + "".join(f"\n{'':32}{line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
