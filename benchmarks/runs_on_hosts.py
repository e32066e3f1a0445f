"""A run of ``gatdist train`` on :mod:`benchmarks.hosts`, recorded by a plugin of its workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.case import gatdist_command
from benchmarks.hosts import Host, Hosts

# The fastest detection that tolerates a network outage of 5 s; see `benchmarks.hosts`.
SETTINGS = (
    "evaluate.metrics=[]",
    "cluster.backend=gloo",
    "cluster.heartbeat_timeout_s=20",
    "cluster.straggler_warn_s=4",
)
# Writing a few times a second does not slow a step; at the start, each step is written.
_EVERY_S = 0.2
_PLUGIN = '''
"""Notes where the run is. Written by benchmarks.runs_on_hosts."""
import json, os, pathlib, signal, socket, time
from gatdist.common import position

imported, folder, noted = time.time(), pathlib.Path(__file__).parent, []
every_s = EVERY_S
dies_at = []

def started():
    stat = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up_s = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return time.time() - up_s + int(stat[19]) / os.sysconf("SC_CLK_TCK")

def write(file, text):
    with (folder / file).open("a") as out:
        out.write(text + "\\n")

def beat():
    here, now = position.here, time.time()
    if not noted:
        about = {"attempt": here.attempt, "rank": here.rank, "pid": os.getpid()}
        about |= {"host": socket.gethostname(), "started": started()}
        about |= {"imported": imported, "ready": now}
        write("workers.jsonl", json.dumps(about))
    if here.rank == 0 and (len(noted) < 3 or now - noted[-1] > every_s):
        noted.append(now)
        write("journal", f"{now:.3f} {here.attempt} {here.step}")
        order = folder / "die-in-upload"
        if order.exists():
            dies_at.append(order.read_text())
            order.unlink()
    elif here.rank and not noted:
        noted.append(now)

def hook(place):
    if place in dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if place == "data":
        beat()

position.hook = hook
'''
_PLUGIN_NAME = "notes_of_this_run"


class Beat(NamedTuple):
    """Progress of worker 0: seconds since the epoch, start of the run from 1, steps made."""

    time_s: float
    attempt: int
    step: int


class Worker(NamedTuple):
    """A training process; times in seconds since the epoch, ``ready``: of the first batch."""

    attempt: int
    rank: int
    pid: int
    host: str
    started: float
    imported: float
    ready: float


class HostsRun:
    """A run directory on the hosts' common file system, and the commands that train in it.

    ``messages`` are standard error with the time of each line; ``ended`` is 0 while a command runs.
    Worker 0 notes its steps every ``every_s``.
    """

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        settings: Sequence[str],
        workers: str = "2",
        every_s: float = _EVERY_S,
    ) -> None:
        self.hosts, self.folder, self.run_dir = hosts, folder, folder / "run"
        self.messages: list[tuple[float, str]] = []
        self.ended = 0.0
        self._settings = [*SETTINGS, *settings, f'plugins=["{_PLUGIN_NAME}"]']
        self._workers = workers
        self._process: subprocess.Popen[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_PLUGIN_NAME}.py").write_text(_PLUGIN.replace("EVERY_S", str(every_s)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self.kill_driver()
            self._await_no_workers()

    def start(self) -> None:
        self.ended = 0.0
        self._process = self.hosts.head.start(
            *gatdist_command(
                "train", "digits", "--workers", self._workers, "--address",
                self.hosts.head.ray_address, "--run-dir", "run", "--json", settings=self._settings,
            ),
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=[self._process], daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as pipe, (self.folder / "driver.log").open("a") as log:
            for line in pipe:
                self.messages.append((time.time(), line.rstrip()))
                log.write(f"{time.strftime('%H:%M:%S')} {line}")
                log.flush()
        process.wait()
        if process is self._process:
            self.ended = time.time()

    @property
    def status(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def kill_driver(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _await_no_workers(self) -> None:
        with suppress(TimeoutError):
            until(lambda: not any(map(lives, self.workers())), "the workers' end", 30)

    def last(self) -> Beat | None:
        with suppress(FileNotFoundError), (self.folder / "journal").open("rb") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 200))
            lines = journal.read().decode().split("\n")[:-1]
            return _beat(lines[-1]) if lines else None
        return None

    def beats(self) -> list[Beat]:
        with suppress(FileNotFoundError):
            return sorted(map(_beat, (self.folder / "journal").read_text().splitlines()))
        return []

    def moves(self) -> bool:
        last = self.last()
        return last is not None and time.time() - last.time_s < 1.5

    def all_workers(self) -> list[Worker]:
        """Return all that have trained, in the order of their first step."""
        return [Worker(**fields) for fields in _lines(self.folder / "workers.jsonl")]

    def workers(self) -> list[Worker]:
        """Return the workers of the last start that have not died, worker 0 first."""
        found = self.all_workers()
        if "cluster.after_loss=continue" not in self._settings:
            newest = max((worker.attempt for worker in found), default=0)
            return sorted((w for w in found if w.attempt == newest), key=lambda w: w.rank)
        # Each other worker 0 numbers an attempt; ranks are those of the first step.
        return sorted(filter(lives, found), key=lambda w: (w.attempt, w.rank))

    def host_of(self, worker: Worker) -> Host:
        return next(host for host in self.hosts.workers if host.name == worker.host)

    def die_in_upload(self, file: str) -> None:
        (self.folder / "die-in-upload").write_text(f"commit/{file}")

    def committed(self) -> list[Path]:
        found = [path.parent for path in self.run_dir.glob("checkpoints/*/MANIFEST.json")]
        return sorted(found, key=lambda path: path.name)  # begins with the samples, padded

    def attempts(self) -> list[dict[str, Any]]:
        return _lines(self.run_dir / "attempts.jsonl")

    def changes(self) -> list[dict[str, Any]]:
        """Return the changes of workers without a restart."""
        return _lines(self.run_dir / "worker_changes.jsonl")

    def ticks(self) -> list[dict[str, Any]]:
        return _lines(self.run_dir / "metrics.jsonl")


def until(condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)
    return value


def gaps(beats: Sequence[Beat], since_s: float) -> list[tuple[float, float]]:
    """Return the times between new steps, from the one in which ``since_s`` is."""
    reached, at_s, found = -1, 0.0, []
    for beat in beats:
        if beat.step > reached:
            if beat.time_s > since_s and reached >= 0:
                found.append((at_s, beat.time_s))
            reached, at_s = beat.step, beat.time_s
    return found


def kill(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)


def kill_host(run: HostsRun, worker: Worker, away_s: float) -> float:
    """Kill the host of a worker, and start it again; return when."""
    host = run.host_of(worker)
    host.kill()
    time.sleep(away_s)
    began = time.time()
    run.hosts.join(host)
    return began


def lives(worker: Worker) -> bool:
    try:
        words = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError):
        return False
    started = time.time() - up_s + int(words[19]) / os.sysconf("SC_CLK_TCK")
    return words[0] not in "ZX" and abs(started - worker.started) < 1


def _beat(line: str) -> Beat:
    time_s, attempt, step = line.split()
    return Beat(float(time_s), int(attempt), int(step))


def _lines(file: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in file.read_text().splitlines()]
    return []
