"""Workers, hosts and drivers die; the run ends as an uninterrupted one."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from host_runs import Runs, now

from support import wait_until

pytestmark = pytest.mark.hosts


def test_workers_killed_in_every_phase_and_all_at_once(runs: Runs, undisturbed: str) -> None:
    """Faults 1, 2, 3, 5, 9, 10 and 11, and a replacement that dies before it has the state.

    The run starts again only when all workers are dead: then from the last checkpoint, or, if that
    is damaged, from the one before.
    """
    runs.faults(
        """
        def turn_a_bit():
            manifests = "run/checkpoints/000007040.*/MANIFEST.json"
            while not list(folder.glob(manifests)): time.sleep(0.05)
            file = next(folder.glob(manifests)).parent / "discriminator.safetensors"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            kill()
        def spoil_ray():
            files = [f for f in (folder / "tmp").rglob("*") if f.is_file()]
            for file in files: os.truncate(file, file.stat().st_size // 2)
            (folder / "spoiled").write_text(" ".join(f.name for f in files))
            kill()
        fail_at("discriminator", once(kill), rank=1, step=30, attempt=None)
        fail_at("heal", once(kill), rank=1, attempt=None)
        fail_at("generator", once(kill), rank=0, step=70, attempt=None)
        fail_at("optimizer", once(kill), rank=1, step=110, attempt=None)
        for rank in (0, 1): fail_at("data", once(kill), rank=rank, step=150, attempt=None)
        fail_at("evaluation", once(kill), rank=1, step=160, attempt=None)
        fail_at("commit/generator.safetensors", once(kill), rank=0, step=200, attempt=None)
        fail_at("data", once(turn_a_bit), rank=0, step=230, attempt=None)
        fail_at("data", once(kill), rank=1, step=230, attempt=None)
        fail_at("data", once(spoil_ray), rank=0, step=250, attempt=None)
        """
    )
    runs.start()
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == undisturbed
    attempts = runs.attempts()
    resumed = [one["resumed_from"] for one in attempts]
    # Another worker 0, a restart, another worker 0, a restart, another worker 0.
    assert resumed[:3] == [None, 70 * 32, 4480]
    assert all(6400 <= each < 7040 for each in resumed[3:5])
    assert resumed[5:] == [250 * 32]
    assert all(re.search(r"worker \d", one["reason"]) for one in attempts[1:])
    assert re.search(r"000007040\.\S+/discriminator.safetensors: ", runs.errors)
    assert (runs.folder / "spoiled").read_text()


def test_host_dies_and_returns_and_then_the_driver_dies(runs: Runs, undisturbed: str) -> None:
    """Faults 4 and 6, where a loss ends the launch."""
    runs.faults(
        """
        fail_at("generator", lambda: note("begun"), rank=1, step=60, attempt=1)
        fail_at("data", hang, rank=1, step=61, attempt=1)
        fail_at("optimizer", lambda: note("again"), rank=0, attempt=2)
        """
    )
    runs.start("cluster.after_loss=restart")
    runs.wait_for("begun")
    host, died = runs.host_of("begun"), now()
    host.kill()
    time.sleep(6)
    runs.hosts.join(host)
    took_s = runs.wait_for("again", 300) - died
    assert took_s < 60  # benchmarks measure how long it should be
    before = len(runs.committed())
    wait_until(lambda: runs.committed()[-1] > 3200, "a later checkpoint")
    assert before
    os.kill(runs.process.pid, signal.SIGKILL)
    runs.finish()
    runs.start("cluster.after_loss=restart")  # at once: the old workers may still be running
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == undisturbed
    assert runs.attempts()[-1]["resumed_from"] >= 3200
