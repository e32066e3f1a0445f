"""A run of 32 worker processes on this machine, with faults: does it end, and what does it cost.

The networks are tiny, so that the control plane is what is measured: the CPU time of the driver's
processes per second and worker, while nothing fails. It is extrapolated to 4,096 workers with the
intervals that the driver uses there. Faults: a worker is killed, four at once, one stops for 10 s,
and worker 0 is killed. The result must have the bytes of one undisturbed process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.case import gatdist_command, parser, positive, save
from benchmarks.runs_on_hosts import until
from gatdist.cluster import policies
from gatdist.runs.inspection import digest

BATCH, MANY = 64, 4096
TARGET_CORES = 0.3
SETTINGS = [
    f"run.global_batch={BATCH}",
    "run.log_every_samples=6400",
    "run.checkpoint_every_samples=6400",
    "run.reduction=canonical",
    f"run.virtual_workers={BATCH}",
    "evaluate.metrics=[]",
    "cluster.heartbeat_timeout_s=60",
    'plugins=["notes"]',
]
_PLUGIN = """
import os, pathlib
from gatdist.common import position
folder = pathlib.Path(__file__).parent / "notes"
def note(place):
    if place == "data" and not (folder / str(os.getpid())).exists():
        (folder / str(os.getpid())).touch()
    if place == "data" and position.here.rank == 0:
        (folder / "step").write_text(f"{position.here.step} {os.getpid()}")
position.hook = note
"""
# Processes of the driver's machine, by the beginnings of their titles.
_ROLES = {
    "mailbox": "ray::Mailbox",
    "controllers": "ray::TrainController",
    "GCS": "gcs_server",
    "raylet": "raylet",
}


def main() -> None:
    arguments = parser("many_workers", __doc__)
    arguments.add_argument("--workers", type=positive, default=32)
    arguments.add_argument("--steps", type=positive, default=1500)
    arguments.add_argument("--calm-s", type=positive, default=30)
    given = arguments.parse_args()
    settings = [*SETTINGS, f"run.total_samples={given.steps * BATCH}"]
    with tempfile.TemporaryDirectory() as name, _ray(given.workers, Path(name)) as (address, mark):
        folder = Path(name)
        notes = folder / "notes"
        notes.mkdir()
        (folder / "notes.py").write_text(_PLUGIN)
        sizes = f"{given.workers // 2}:{given.workers}"
        words = ["train", "ring", "--workers", sizes, "--address", address, "--run-dir", "run"]
        command = gatdist_command(*words, "--json", settings=settings)
        env = os.environ | {"RAY_AUTH_MODE": "disabled"}
        began = time.time()
        with (folder / "log").open("wb") as log:
            driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)
        try:
            found = _measure(driver, notes, folder / "log", mark, given, began)
            status = driver.wait(1200)
        finally:
            driver.kill()
            driver.wait()
        found |= {"status": status, "total_s": time.time() - began, "settings": settings}
        found["digest"] = digest(str(folder / "run"))
        found["changes"] = _lines(folder / "run/worker_changes.jsonl")
        found["reference_digest"] = _reference(folder, settings, env)
        found["equal"] = found["digest"] == found["reference_digest"]
    save(given.out, found)
    print({key: found[key] for key in found if key not in ("changes", "settings")})


def _measure(
    driver: subprocess.Popen[bytes], notes: Path, log: Path, mark: str, given: Any, began: float
) -> dict[str, Any]:
    def step() -> int:
        with suppress(OSError, ValueError, IndexError):
            return int((notes / "step").read_text().split()[0])
        return 0

    def running() -> bool:
        if driver.poll() is not None:
            raise SystemExit(log.read_text())
        return True

    def pids() -> list[int]:
        found = [int(file.name) for file in notes.iterdir() if file.name.isdigit()]
        return [pid for pid in found if _cpu_s(pid) is not None]

    until(lambda: running() and len(pids()) == given.workers and step() > 5, "steps", 900)
    start_s = time.time() - began
    print(f"{given.workers} workers make steps after {start_s:.0f} s", flush=True)
    roles = _processes(mark) | {"driver": [driver.pid]}
    before, first, at = _cpu_of(roles), step(), time.time()
    time.sleep(given.calm_s)
    seconds = time.time() - at
    after = _cpu_of(roles)
    cores = {role: (after[role] - before[role]) / seconds for role in roles}
    step_s = seconds / max(1, step() - first)
    print({role: f"{share:.3f} cores" for role, share in cores.items()}, flush=True)

    for kill in (1, 4):
        alive = pids()
        zero = int((notes / "step").read_text().split()[1])
        for pid in [pid for pid in alive if pid != zero][:kill]:
            os.kill(pid, signal.SIGKILL)
        _await_steps(step, running)
    stopped = next(pid for pid in pids() if pid != int((notes / "step").read_text().split()[1]))
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(10)
    with suppress(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)
    _await_steps(step, running)
    os.kill(int((notes / "step").read_text().split()[1]), signal.SIGKILL)
    _await_steps(step, running)
    return {
        "workers": given.workers,
        "start_s": start_s,
        "step_s": step_s,
        "cores": cores,
        "cpu_s_per_worker_s": (cores["driver"] + cores["mailbox"]) / given.workers,
        f"cores_at_{MANY}": _extrapolated(cores, given.workers),
        "target_cores": TARGET_CORES,
    }


def _await_steps(step: Any, running: Any, count: int = 20) -> None:
    reached, began = step(), time.time()
    until(lambda: running() and step() >= reached + count, f"{count} more steps", 300)
    print(f"{count} more steps after {time.time() - began:.1f} s", flush=True)


def _extrapolated(cores: dict[str, float], workers: int, per_host: int = 8) -> float:
    """Return the share of a core at ``MANY`` workers.

    Their hosts send messages less often, and the driver looks at them less often. Here all workers
    are on one host, whose messages are few: all time is taken as that of looks.
    """
    looks = policies.look_interval_s(workers) / policies.look_interval_s(MANY)
    return (cores["driver"] + cores["mailbox"]) * MANY / workers * looks


def _processes(mark: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {role: [] for role in _ROLES}
    for pid in _marked(mark):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for role, start in _ROLES.items():
                if words.startswith(start) or f"/{start} " in words:
                    found[role].append(pid)
    return found


def _cpu_of(roles: dict[str, list[int]]) -> dict[str, float]:
    return {role: sum(_cpu_s(pid) or 0.0 for pid in pids) for role, pids in roles.items()}


def _cpu_s(pid: int) -> float | None:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if words[0] in "ZX":
        return None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _reference(folder: Path, settings: list[str], env: dict[str, str]) -> str:
    command = gatdist_command(
        "train", "ring", "--local", "--run-dir", "one", "--json", settings=settings
    )
    one = env | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, check=True, env=one, capture_output=True, timeout=1800)
    return digest(str(folder / "one"))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@contextmanager
def _ray(cpus: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Start a Ray head with room for that many workers; yield its address and its mark."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mark = f"gatdist-many-{port}"
    options = [f"--num-cpus={cpus}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    program = Path(sys.executable).parent / "ray"
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "MARK": mark}
    try:
        with (folder / "ray.log").open("wb") as log:
            command = [str(program), "start", "--head", f"--port={port}", *options]
            memory = "--object-store-memory=200000000"
            subprocess.run([*command, memory], check=True, stdout=log, stderr=log, env=env)
        yield f"127.0.0.1:{port}", mark
    finally:
        for pid in _marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"MARK={mark}".encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


if __name__ == "__main__":
    main()
