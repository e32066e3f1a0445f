"""Storage that is slow, full, unavailable or lost, and two attempts in one run directory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import servers

from benchmarks.proxy import Fault, Proxy
from faulty_runs import CANONICAL, HEAD, SETTINGS, TOTAL
from gatdist.runs import Checkpoints, read_lines
from gatdist.storage import Store
from support import end_group, free_port, start_gatdist, wait_until

pytestmark = pytest.mark.storage

# Every write to the run directory.
WRITES = Fault("refuse", methods=("PUT", "POST", "DELETE"), requests=(0, 10**9))


# Reduce the minute in which an operation is retried to a few seconds.
IMPATIENT = """
from gatdist.storage.connection import Connection
usual = Connection.run
def run(self, name, operation):
    self._retry_budget_s = 8.0
    return usual(self, name, operation)
Connection.run = run
"""


class Command:
    """``gatdist train --local`` with its output in files."""

    def __init__(self, folder: Path, run_dir: str, *settings: str) -> None:
        self._errors = folder / f"stderr-{free_port()}"
        sets = [word for s in (*SETTINGS, *CANONICAL, *settings) for word in ("--set", s)]
        with self._errors.open("w") as errors:
            self.process = start_gatdist(
                *("train", "digits", "--local", "--run-dir", run_dir, *sets),
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def finish(self, timeout_s: float = 300) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            end_group(self.process)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start commands, and stop them after the test."""
    started: list[Command] = []

    def start(run_dir: str, *settings: str) -> Command:
        started.append(Command(tmp_path, run_dir, *settings))
        return started[-1]

    yield start
    for one in started:
        end_group(one.process)
        sys.stderr.write(one.errors)


def newest_digest(store: Store) -> str:
    newest = Checkpoints(store.child("checkpoints")).newest()
    assert newest is not None
    return newest.digest()


def num_logs(errors: str) -> int:
    return sum("loss G" in line for line in errors.splitlines())


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.mark.lasting
def test_training_continues_while_storage_is_unavailable(
    moto: servers.Server, command: Callable[..., Command], reference_digest: Callable[..., str]
) -> None:
    """Fault 12: 503 to every write for a while; the result is the same as without it."""
    with Proxy(moto.address) as proxy:
        url = f"{moto.new_bucket()}/run"
        run = command(
            url,
            f"run.storage_options={json.dumps(moto.options(proxy.url))}".replace(": ", "="),
            "evaluate.every_samples=0",  # an evaluation would wait for its checkpoint
        )
        wait_until(lambda: num_logs(run.errors) >= 2, "a log interval", timeout_s=300)
        proxy.faults = [WRITES]
        before = num_logs(run.errors)
        # One warning about failed writes, and one about a skipped checkpoint.
        wait_until(lambda: re.search(rf"{url} for \d+ s", run.errors), "a warning", timeout_s=300)
        assert num_logs(run.errors) > before
        assert len(re.findall(r"warning: .* at [\d,]+ samples", run.errors)) == 1
        proxy.faults = []
        assert run.finish() == 0, run.errors
        store = Store(url, moto.options(moto.address))
        assert newest_digest(store) == reference_digest(*CANONICAL)
        seen = [line["samples_seen"] for line in read_lines(store, "metrics.jsonl")]
        assert seen == sorted(set(seen))
        assert seen[-1] == TOTAL
        assert len(read_lines(store, "attempts.jsonl")) == 1


@pytest.mark.lasting
def test_lasting_outage_ends_the_run_with_one_error(
    moto: servers.Server,
    command: Callable[..., Command],
    reference_digest: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Fault 13: the last checkpoint is valid, and the same command resumes from it."""
    options = moto.options(moto.address)
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    with Proxy(moto.address) as proxy:
        url = f"{moto.new_bucket()}/run"
        settings = f"run.storage_options={json.dumps(moto.options(proxy.url))}".replace(": ", "=")
        run = command(url, settings, 'plugins=["impatient"]')
        wait_until(lambda: num_logs(run.errors) >= 3, "log intervals", timeout_s=300)
        proxy.faults = [WRITES]
        assert run.finish(300) == 75, run.errors
        assert run.errors.count("gatdist: ") == 1
        assert "Traceback" not in run.errors
        assert newest_digest(Store(url, options))
        proxy.faults = []
        again = command(url, settings)
        assert again.finish() == 0, again.errors
        assert newest_digest(Store(url, options)) == reference_digest(*CANONICAL)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_that_gets_space_in_time(
    tmp_path: Path, command: Callable[..., Command], reference_digest: Callable[..., str]
) -> None:
    """Fault 13: others fill it; the previous checkpoint is valid; then space is freed."""
    with small_disk(tmp_path / "disk", "5m") as disk:
        run = command(f"{disk}/run")
        wait_until(lambda: num_logs(run.errors) >= 2, "a log interval", timeout_s=300)
        with suppress(OSError), (disk / "others").open("wb", buffering=0) as others:
            while True:
                others.write(bytes(2**12))
        slow = rf"{disk}/run for \d+ s"
        wait_until(lambda: re.search(slow, run.errors), "a warning", timeout_s=300)
        for manifest in disk.glob("run/checkpoints/*/MANIFEST.json"):
            assert Checkpoints(Store(str(manifest.parents[1]))).read(manifest.parent.name)
        (disk / "others").unlink()
        assert run.finish() == 0, run.errors
        assert newest_digest(Store(f"{disk}/run")) == reference_digest(*CANONICAL)
        seen = [line["samples_seen"] for line in read_lines(Store(f"{disk}/run"), "metrics.jsonl")]
        assert seen == sorted(set(seen))
        assert seen[-1] == TOTAL


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_without_space_for_checkpoints_is_reported_before_training(
    tmp_path: Path, command: Callable[..., Command]
) -> None:
    with small_disk(tmp_path / "disk", "600k") as disk:
        run = command(f"{disk}/run")
        assert run.finish() == 2
        assert re.search(r"0\.\d MB .* 3 .* 1\.\d MB", run.errors)
        assert list(disk.glob("run/*")) == []


def test_of_two_live_attempts_the_older_is_fenced(
    tmp_path: Path,
    command: Callable[..., Command],
    run_gatdist: Any,
    reference_digest: Callable[..., str],
) -> None:
    """Fault 17: one is stopped just before its commit, another takes over, the first continues."""
    faults = 'fail_at("commit/MANIFEST.json", lambda: (note("frozen"), freeze()), step=60)\n'
    (tmp_path / "faults_of_this_test.py").write_text(HEAD + faults)
    settings = ('plugins=["faults_of_this_test"]',)
    stale = command("run", *settings)
    wait_until(lambda: (tmp_path / "frozen").exists(), "the first to freeze", timeout_s=300)
    current = command("run", *settings)
    assert current.finish() == 0, current.errors
    store = Store(str(tmp_path / "run"))
    digest, files = newest_digest(store), read_lines(store, "metrics.jsonl")
    assert digest == reference_digest(*CANONICAL)
    os.kill(stale.process.pid, signal.SIGCONT)
    assert stale.finish() == 1, stale.errors
    for fact in ("attempt 1 ", "attempt 2 "):
        assert fact in stale.errors
    assert newest_digest(store) == digest
    assert read_lines(store, "metrics.jsonl") == files
    verified = run_gatdist("verify", "run", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
