"""Runs what this machine can, one after the other: ``python -m benchmarks [NAME …]``.

Each writes ``benchmarks/results/<date>_<name>`` with a picture; at the end a table tells what came
of each, and what was left out for which reason. Without names all run, which takes hours: those of
``LONG`` only when they are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

from benchmarks import plots
from benchmarks.records import RESULTS, Record

OWN = ("games", "ring", "remedies", "overlap", "packing", "using", "overheads", "startup")
OWN += ("recovery", "soak", "simulation", "fuzz")
PRESETS = ("digits", "digits-conditional", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2")
MEASURED = {
    "step": ["--two-processes"],
    "data": [],
    "storage": ["--num", "50000"],
    "scaling": ["--workers", "1,2"],
}
# The settings that an hour of glyphs can tell something of, and goals that they reach.
_SETTINGS = (
    "alternating",
    "alternating_fresh_bfloat16",
    "alternating_kept_bfloat16",
    "simultaneous",
)
_SETTINGS += ("one_stage", "one_stage_warmed_bfloat16", "extragradient", "optimistic")
QUALITY_OF_GLYPHS = ["--preset", "glyphs", "--goal", "1.7", "--goal", "2.5", "--goal", "4"]
QUALITY_OF_GLYPHS += [word for name in _SETTINGS for word in ("--only", name)]
# The module that each runs as, and its arguments; in this order.
CASES: dict[str, tuple[str, ...]] = {
    **{name: (f"benchmarks.cases.{name}",) for name in OWN},
    "gpu": ("benchmarks.gpu",),
    "quality_digits": ("benchmarks.cases.quality", "--preset", "digits"),
    "quality_ring": ("benchmarks.cases.quality", "--preset", "ring"),
    "quality_glyphs": ("benchmarks.cases.quality", *QUALITY_OF_GLYPHS),
    **{name: ("benchmarks.cases.preset", name) for name in PRESETS},
    **{name: ("gatdist.cli", "bench", name, *more) for name, more in MEASURED.items()},
}
LONG = {"soak", "fuzz", "speech", "words", "glyphs-r3gan", "glyphs-stylegan2"}
LONG |= {"quality_digits", "quality_ring", "quality_glyphs"}


# Where `make setup-system` puts it.
NGINX = RESULTS.parents[1] / ".tools/nginx/usr/sbin"


def _no_cuda() -> bool:
    import torch

    return not torch.cuda.is_available()


def _no_nginx() -> bool:
    from gatdist.bench.data.servers import nginx_program

    return nginx_program() is None


# What some need, and whether it is lacking here.
NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    **{
        name: ("root, for hosts in network namespaces", lambda: os.geteuid() != 0)
        for name in ("recovery", "soak")
    },
    "gpu": ("an accelerator", _no_cuda),
    "storage": ("nginx (make setup-system)", _no_nginx),
    "packing": ("webdataset", lambda: find_spec("webdataset") is None),
}


def main() -> int:
    """Run them; 0 if all went well."""
    os.environ["PATH"] += f":{NGINX}"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    names = parser.parse_args().names or [name for name in CASES if name not in LONG]
    for name in names:
        if name not in CASES:
            parser.error(f"{name}: not known; there are {', '.join(CASES)}")
    rows = [attempted(name) for name in names]
    print("\n" + "\n".join(line for row in rows for line in row.splitlines()))
    return int(any(FAILED in row for row in rows))


FAILED = "failed with status"


def attempted(name: str) -> str:
    """Run one where it can be; what came of it, in some lines."""
    what, is_lacking = NEEDS.get(name, ("", lambda: False))
    if is_lacking():
        return f"{name:20} left out: needs {what}"
    print(f"== {name}", flush=True)
    began = time.monotonic()
    status = run(name)
    message = f"{name:20} {time.monotonic() - began:6.0f} s  "
    if status:
        return f"{message}{FAILED} {status}"
    return message + summed_up(name)


def run(name: str) -> int:
    """The status of one. What prints JSON has it written down for it."""
    command = [sys.executable, "-m", *CASES[name]]
    out = RESULTS / f"{time.strftime('%Y-%m-%d')}_{name}"
    if name == "scaling":  # it draws by itself
        command += ["--out", str(out)]
    if name not in MEASURED or name == "scaling":
        return subprocess.run(command, check=False).returncode
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=False)
    if not done.returncode:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_bytes(done.stdout)
    return done.returncode


def summed_up(name: str) -> str:
    """What its newest record says, after its picture was drawn."""
    folders = sorted(RESULTS.glob(f"[0-9]*_{name}"))
    if not folders:
        return "done"
    record = Record(folders[-1], json.loads((folders[-1] / "result.json").read_text()))
    plots.draw(name, record.found, record.folder / f"{name}.png")
    lines = [f"{line.what}: {line.value} ({line.spread})" for line in record.lines()]
    return f"done: {record.folder}" + "".join(f"\n{'':32}{line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
