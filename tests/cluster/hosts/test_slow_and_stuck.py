"""Slow, frozen and deadlocked workers are named; those that do not recover are replaced."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from host_runs import Runs

pytestmark = pytest.mark.hosts


def test_slow_worker_is_named_with_its_phase(runs: Runs, undisturbed: str) -> None:
    """Fault 15: its data takes 0.15 s longer than the others'."""
    runs.faults(
        """
        for step in range(60, 140):
            fail_at("data", lambda: time.sleep(0.15), rank=1, step=step)
        fail_at("data", lambda: note("slow"), rank=1, step=60)
        """
    )
    runs.start()
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    name = runs.host_of("slow").name
    named = re.search(rf"worker 1 on {name}\b.*'data'", runs.errors)
    assert named, runs.errors
    # Within the 40 steps of two log intervals.
    before = runs.errors[: named.start()]
    assert "3,200/9,600" not in before
    assert len(runs.attempts()) == 1
    assert runs.digest() == undisturbed


@pytest.mark.slow
def test_slow_link_is_named(runs: Runs, undisturbed: str) -> None:
    """Fault 15: a host's sending rate is limited for a while."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=1, step=60)')
    runs.start()
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.slow(4)
    runs.wait_for_message(rf"worker 1 on {host.name}\b")
    host.slow(None)
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert "gatdist doctor" in runs.errors
    assert len(runs.attempts()) == 1, runs.errors
    assert runs.digest() == undisturbed


def test_frozen_worker_is_named_and_may_recover(runs: Runs, undisturbed: str) -> None:
    """Fault 15: stopped for longer than ``straggler_warn_s``, less than ``heartbeat_timeout_s``."""
    runs.faults('fail_at("discriminator", lambda: (note("frozen"), freeze()), rank=1, step=60)')
    runs.start()
    runs.wait_for("frozen")
    time.sleep(8)
    os.kill(int((runs.folder / "frozen").read_text().split()[0]), signal.SIGCONT)
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert re.search(r"worker 1 on w\d \(process \d+\).* \d s", runs.errors)
    assert len(runs.attempts()) == 1, runs.errors
    assert runs.digest() == undisturbed


def test_deadlocked_and_frozen_workers_are_replaced(runs: Runs, undisturbed: str) -> None:
    """Fault 16: after cluster.heartbeat_timeout_s, with the stacks of all workers."""
    runs.faults(
        """
        fail_at("generator", once(hang), rank=1, step=60, attempt=None)
        fail_at("generator", once(freeze), rank=0, step=120, attempt=None)
        """
    )
    runs.start("cluster.heartbeat_timeout_s=12", "cluster.straggler_warn_s=3")
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == undisturbed
    reasons = [one["reason"] for one in runs.changes()]
    assert len(reasons) == 2, runs.errors
    assert re.search(r"worker 1 on w\d .* 1\d s; .* 'generator'", reasons[0])
    assert re.search(r"worker 0 on w\d .* 1\d s; ", reasons[1])
    (first, second) = re.findall(r"stacks: (\S+)", runs.errors)
    text = Path(first).read_text()
    assert text.count("(trains)") == 2
    assert "in hang" in text
    assert Path(second).read_text().count("(trains)") == 1  # a frozen worker reports nothing
