"""Recovery time after the death of a worker, a host or the driver, by phase.

A host returns after 6 s; the driver's command is run again, on the same Ray. Recovery ends with the
first new step. Phases are read from the driver's messages, Ray's logs and a plugin's records.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import parser, positive, save
from benchmarks.hosts import Hosts, require_hosts
from benchmarks.runs_on_hosts import Beat, HostsRun, kill, kill_host, until

BACK_AFTER_S = 6.0
TARGETS_S = {"host": 20.0, "driver": 10.0}
SETTINGS = [
    f"run.total_samples={10**12}",
    "run.log_every_samples=2048",
    "run.checkpoint_every_samples=2048",
    "cluster.after_loss=restart",
    'model.generator={name="residual", width=16}',
    'model.discriminator={name="residual", width=16}',
]
# Messages of Ray Train's controller at the end of each phase.
_LOGGED = {
    "controller starts": "Requesting resources",
    "wait for the hosts": "Placement group ready",
    "worker processes start": "worker actors created",
    "Ray Train's imports": "Train context initialized",
    "process group": "Train function launched",
}


def main() -> None:
    arguments = parser("recovery", __doc__)
    arguments.add_argument("--times", type=positive, default=5)
    given = arguments.parse_args()
    require_hosts()
    measured: dict[str, list[dict[str, Any]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Hosts() as hosts,
        HostsRun(hosts, Path(folder), SETTINGS) as run,
    ):
        run.start()
        for kind in ("worker", "host", "driver"):
            for number in range(given.times):
                measured.setdefault(kind, []).append(measure(run, kind, number))
                record(measured, given.out)
                print(f"{kind} {number + 1}: {measured[kind][-1]['total_s']:.1f} s", flush=True)
    print(table(measured))


def disturb(run: HostsRun, kind: str, number: int) -> None:
    workers = run.workers()
    worker = workers[number % len(workers)]
    match kind:
        case "worker":
            kill(worker)
        case "host":
            kill_host(run, worker, BACK_AFTER_S)
        case "driver":
            run.kill_driver()
            run.start()


def measure(run: HostsRun, kind: str, number: int) -> dict[str, Any]:
    calm = time.time()
    until(lambda: run.moves() and _newest_commit(run) > calm, "a checkpoint after the last", 120)
    before = run.last()
    assert before is not None
    began = time.time()
    disturb(run, kind, number)
    ready, made = until(lambda: _first_step(run, before.attempt), "a new step", 180)
    phases, last = {}, began
    marks = [*_marks(run, began), ("set up", ready.time_s), ("first step", made.time_s)]
    for name, at_s in marks:
        phases[name], last = max(0.0, at_s - last), max(last, at_s)
    return {"total_s": made.time_s - began, "phases_s": phases, "attempt": made.attempt}


def _newest_commit(run: HostsRun) -> float:
    manifests = run.run_dir.glob("checkpoints/*/MANIFEST.json")
    return max((path.stat().st_mtime for path in manifests if path.exists()), default=0.0)


def _first_step(run: HostsRun, attempt: int) -> tuple[Beat, Beat] | None:
    """The first two beats of a later attempt: before its first step, and after it."""
    later = [beat for beat in run.beats() if beat.attempt > attempt]
    mine = [beat for beat in later if beat.attempt == later[-1].attempt]
    return (mine[0], mine[1]) if len(mine) > 1 else None


def _marks(run: HostsRun, since_s: float) -> list[tuple[str, float]]:
    restarts = [at for at, line in run.messages if at > since_s and "Restarting" in line]
    marks = [("detection", at) for at in restarts[:1]]
    marks += [("driver starts", at) for at in _connections(run) if at > since_s]
    entries = []
    for file in run.hosts.folder.glob("head/ray/session_2*/logs/train/*sys-controller*"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            entries.append((entry.get("timestamp_ns", 0) / 1e9, str(entry.get("message", ""))))
    new = sorted(entry for entry in entries if entry[0] > since_s)
    for name, text in _LOGGED.items():
        # The last one, if a failed start was repeated.
        marks += [(name, at) for at, message in new if text in message][-1:]
    return marks


def _connections(run: HostsRun) -> list[float]:
    """Times when drivers connected to Ray, which starts a log for each."""
    found = []
    for file in run.hosts.folder.glob("head/ray/session_2*/logs/python-core-driver-*"):
        with file.open() as log:
            stamp = log.read(24).strip("[")  # local time, as 2026-11-24 22:26:50,515
        found.append(datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp())
    return found


def record(measured: dict[str, list[dict[str, Any]]], out: Path) -> None:
    result = {
        "settings": SETTINGS,
        "back_after_s": BACK_AFTER_S,
        "targets_s": TARGETS_S,
        "median_s": {kind: median(o["total_s"] for o in ones) for kind, ones in measured.items()},
        "phases_s": {kind: _phases(ones) for kind, ones in measured.items()},
        "measured": measured,
    }
    save(out, result)


def _phases(ones: list[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in ones for name in one["phases_s"])
    return {name: median(one["phases_s"].get(name, 0.0) for one in ones) for name in names}


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    phases = {kind: _phases(ones) for kind, ones in measured.items()}
    names = ["detection", "driver starts", *_LOGGED, "set up", "first step"]
    lines = [f"{'seconds, median':<30}" + "".join(f"{kind:>9}" for kind in measured)]
    for name in names:
        cells = [phases[kind].get(name) for kind in measured]
        lines.append(
            f"{name:<30}" + "".join(f"{'–' if c is None else f'{c:.1f}':>9}" for c in cells)
        )
    totals = {kind: median(one["total_s"] for one in ones) for kind, ones in measured.items()}
    lines.append(f"{'total':<30}" + "".join(f"{totals[kind]:>9.1f}" for kind in measured))
    targets = [f"≤ {TARGETS_S[kind]:.0f}" if kind in TARGETS_S else "–" for kind in measured]
    lines.append(f"{'target':<30}" + "".join(f"{target:>9}" for target in targets))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
