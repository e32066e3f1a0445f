"""Check and measure the step on a GPU. Needs torch, numpy and pydantic; neither Ray nor storage.

A list of parts, each in a process of its own, whose results are in one file. After an interruption
or ``--limit-s``, the same command with the same ``--out`` continues. Exit status: 0, all parts are
done; 75, some are left; 1, a part failed or found an error.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import parser
from benchmarks.gpu.parts import chosen, parts
from benchmarks.gpu.runner import AGAIN, Part, ResultFile, run_part, run_parts
from benchmarks.gpu.tables import as_markdown, is_wrong

_FACTS = Part("facts", limit_s=180)


def main() -> int:
    arguments = parser("gpu", __doc__)
    arguments.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu")
    arguments.add_argument(
        "--size", choices=("full", "small"), default="full", help="small: tiny networks, for a CPU"
    )
    arguments.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="parts such as 'speed/*'"
    )
    arguments.add_argument("--list", action="store_true", help="list the parts and their limits")
    arguments.add_argument(
        "--limit-s", type=float, help="stop before a part would exceed this; run again to continue"
    )
    arguments.add_argument("--retry", action="store_true", help="run parts again that failed")
    given = arguments.parse_args()
    began = time.monotonic()
    some = chosen(given.only)
    if not some:
        arguments.error(f"--only {given.only[-1]}: matches no part (see --list)")
    longest = max(part.usual_s for part in some)
    if given.limit_s is not None and given.limit_s < 2 * longest:
        arguments.error(f"--limit-s {given.limit_s:g}: must be at least {2 * longest:g}")
    if given.list:
        print("\n".join(f"{part.name:44} at most {part.limit_s:.0f} s" for part in some))
        return 0
    if given.device != "cpu" and not torch.cuda.is_available():
        arguments.error("--device cuda: torch finds no CUDA device; --device cpu tries it out")
    # So that a part does not outlast this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def command(part: Part, out: Path) -> list[str]:
        worker = [sys.executable, "-m", "benchmarks.gpu.worker"]
        return [*worker, part.name, given.device, given.size, str(out)]

    known = run_part(_FACTS, command, _FACTS.limit_s)
    if known["status"] != "done":
        print(f"the device does not work: {known['message']}")
        return 1
    results = ResultFile(given.out / "result.json", known["key"])
    if given.retry:
        for name in [name for name, found in results.parts.items() if is_wrong(found)]:
            del results.parts[name]
    limit_s = given.limit_s and given.limit_s - (time.monotonic() - began)
    left = run_parts(some, results, command, known["environment"], limit_s)
    return report(results, given.out, left)


def report(results: ResultFile, out: Path, left: int) -> int:
    """Print and write what is known, in the order of the parts; return the exit status."""
    known: dict[str, Any] = {
        part.name: results.parts[part.name] for part in parts() if part.name in results.parts
    }
    gpu = str(results.facts["device"])
    text = as_markdown(known, gpu)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.md").write_text(text, encoding="utf-8")
    wrong = [name for name, found in known.items() if is_wrong(found)]
    lines = [f"wrong: {', '.join(wrong)}"] if wrong else []
    again = f"{left} left: run the same command again" if left else "none left"
    lines.append(f"{len(known)} parts done in {out / 'result.json'}, {again}")
    print("\n".join(lines))
    if left:
        return AGAIN
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
