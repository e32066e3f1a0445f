"""Run parts in processes of their own, and keep their results in one file.

An error, a lack of memory, a device in an unusable state or a hang costs one part only. Parts whose
result is in the file are skipped, so that a run can be continued.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import progress

AGAIN = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class Part:
    """What one process measures.

    Attributes:
        name: ``correctness/CHECK``, ``speed/PRESET/IMPLEMENTATION`` or ``kernels/PRESET``.
        usual_s: Estimated duration; a part is not started with less time left.
        limit_s: Duration after which it has failed.
    """

    name: str
    usual_s: float = 45
    limit_s: float = 240


Results = dict[str, dict[str, Any]]
# Returns the command that runs a part and writes its result to a path.
Command = Callable[[Part, Path], Sequence[str]]


class ResultFile:
    """Results of parts by name, in a JSON file that is replaced at once.

    Args:
        path: Of the file; it need not exist.
        facts: Device, code and versions. Results with other facts are out of date.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        known = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
        self.parts: Results = {
            name: found for name, found in known.items() if found["facts"] == self.facts
        }

    def add(self, name: str, found: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Add a part's result and write the file."""
        self.parts[name] = {**found, "facts": self.facts}
        text = json.dumps({"parts": self.parts, "environment": environment}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".new")
        written.write_text(text + "\n", encoding="utf-8")
        os.replace(written, self.path)


def run_parts(
    parts: Sequence[Part],
    results: ResultFile,
    command: Command,
    environment: Mapping[str, Any],
    limit_s: float | None = None,
) -> int:
    """Run the parts without a result until the time is over; return the number of those left."""
    began = time.monotonic()
    pending = [part for part in parts if part.name not in results.parts]
    for done, part in enumerate(pending):
        left_s = part.limit_s if limit_s is None else limit_s - (time.monotonic() - began)
        if done and left_s < part.usual_s:
            return len(pending) - done
        found = run_part(part, command, min(left_s, part.limit_s))
        # Not a failure of the part: it has all its time in the next call.
        if found["status"] == "timeout" and done and left_s < part.limit_s:
            return len(pending) - done
        results.add(part.name, found, environment)
        progress(f"{part.name}: {found['status']} in {found['seconds']:.0f} s")
        if found["status"] != "done":
            progress(f"  {found['message']}")
    return 0


def run_part(part: Part, command: Command, limit_s: float) -> dict[str, Any]:
    """Run a part; return ``status`` (done, failed, timeout), ``seconds``, and what it found."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(part, out), stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                code = process.wait(max(limit_s, 1))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = round(time.monotonic() - began, 1)
        if code is None:
            message = f"took longer than {limit_s:.0f} s"
            return {"status": "timeout", "seconds": seconds, "message": message}
        if code == 0 and out.exists():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return {"status": "done", "seconds": seconds, **found}
        return {"status": "failed", "seconds": seconds, "message": _reason(code, log)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, if they still run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)  # a device may hold it back


def _reason(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: {last}"
    # Of an error, which may be followed by hints, the line with its name.
    named = [line for line in lines if line[:1].isalpha() and "Error" in line.partition(":")[0]]
    return named[-1] if named else last
