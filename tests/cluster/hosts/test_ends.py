"""A run that is stopped by a signal, a closing terminal, or Ray leaves nothing behind."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from host_runs import Runs

from faulty_runs import SETTINGS
from gatdist.runs import Checkpoints, read_lines
from gatdist.storage import Store
from support import free_port, marked_processes, wait_until

pytestmark = pytest.mark.hosts


def test_signals_and_closing_terminal_checkpoint(runs: Runs, undisturbed: str) -> None:
    """After each, there is a checkpoint, and the same command resumes from it."""
    runs.start()
    runs.wait_for_message("checkpoint at 1,280")
    os.kill(runs.process.pid, signal.SIGTERM)
    assert runs.finish(300) == 75, runs.errors
    reached = runs.committed()[-1]

    master, slave = pty.openpty()
    runs.start(terminal=slave)
    os.close(slave)
    wait_until(lambda: runs.committed()[-1] > reached + 1280, "checkpoints", timeout_s=300)
    os.close(master)  # the kernel sends SIGHUP
    assert runs.process.wait(300) == 75
    assert runs.committed()[-1] > reached + 1280

    runs.start()
    assert runs.finish() == 0, runs.errors
    first, *others = [one["reason"] for one in runs.attempts()]
    assert first == "new"
    assert len(others) == 2
    assert set(others) <= {"interrupted", "running"}  # the latter if stopped in an evaluation
    assert runs.digest() == undisturbed
    seen = runs.logged()
    assert seen == sorted(set(seen))


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray on this machine with a dashboard, which Ray jobs need."""
    mark, port = f"gatdist-jobs-{os.getpid()}", free_port()
    command = [
        *(Path(sys.executable).parent / "ray", "start", "--head", "--num-cpus=2"),
        *(f"--port={free_port()}", "--include-dashboard=true", f"--dashboard-port={port}"),
        *("--node-ip-address=127.0.0.1", "--object-store-memory=100000000"),
        *("--disable-usage-stats", f"--temp-dir=/tmp/{mark}"),
    ]
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "MARK": mark}
    with (tmp_path / "ray").open("wb") as log:
        subprocess.run(
            command, check=True, env=env, timeout=300, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log,
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    for process in marked_processes(mark):  # `ray stop` would stop every Ray on this machine
        os.kill(process, signal.SIGKILL)
    subprocess.run(["rm", "-rf", f"/tmp/{mark}"], check=True)


def ray_job(dashboard: str, *words: str, timeout_s: float = 300) -> str:
    """Return the output of ``ray job WORDS``."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ray", "job", *words],
        env=os.environ | {"RAY_ADDRESS": dashboard, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.stdout + done.stderr


def test_ray_job_shows_progress_and_can_be_stopped(dashboard: str, tmp_path: Path) -> None:
    sets = [word for s in SETTINGS for word in ("--set", s)]
    train = [sys.executable, "-m", "gatdist", "train", "digits", "--address", "auto"]
    train += ["--workers", "2", "--run-dir", str(tmp_path / "run"), *sets]
    store = Store(str(tmp_path / "run"))

    ray_job(dashboard, "submit", "--no-wait", "--submission-id", "first", "--", *train)
    wait_until(
        lambda: "checkpoint at 1,280" in ray_job(dashboard, "logs", "first"),
        "progress in the job's log",
        timeout_s=300,
    )
    ray_job(dashboard, "stop", "first")
    newest = Checkpoints(store.child("checkpoints")).newest()
    assert newest is not None
    # "running": stopped in an evaluation, which is still to be done.
    assert newest.state["status"] in ("interrupted", "running")

    # The terminal closes as soon as the job is submitted.
    ray_job(dashboard, "submit", "--no-wait", "--submission-id", "second", "--", *train)
    with suppress(subprocess.TimeoutExpired):
        ray_job(dashboard, "logs", "--follow", "second", timeout_s=300)
    assert "succeeded" in ray_job(dashboard, "status", "second")
    assert "9,600" in ray_job(dashboard, "logs", "second")
    assert len(read_lines(store, "attempts.jsonl")) == 2


def test_nothing_is_left_behind(run_gatdist, tmp_path: Path) -> None:
    """A local Ray leaves no process, no shared memory and no temporary folder."""
    mark = f"gatdist-left-{os.getpid()}"
    sets = [w for s in (*SETTINGS, "run.total_samples=640") for w in ("--set", s)]
    own = Path(tempfile.mkdtemp(prefix="gd"))  # Ray's sockets are here: their paths must be short
    before = set(os.listdir("/dev/shm"))
    finished = run_gatdist(
        "train", "digits", "--workers", "2", "--run-dir", "run", *sets,
        cwd=tmp_path, timeout=300, env={"MARK": mark, "TMPDIR": str(own)},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    wait_until(lambda: not marked_processes(mark), "our Ray's processes to end")
    assert set(os.listdir("/dev/shm")) <= before
    assert [name for name in os.listdir(own) if name.startswith("gatdist")] == []
    shutil.rmtree(own)
