"""Workers, hosts and drivers die; the run ends as one that was left alone."""

from __future__ import annotations

import pytest
from runs import Runs, now

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]


def test_workers_killed_in_every_phase_and_all_at_once(runs: Runs, undisturbed: str) -> None:
    """Faults 1, 2, 3 and 5: each launch of the run dies another death."""
    runs.faults(
        """
        fail_at("discriminator", kill, rank=1, step=30, attempt=1)
        fail_at("generator", kill, rank=0, step=70, attempt=2)
        fail_at("optimizer", kill, rank=1, step=110, attempt=3)
        fail_at("data", kill, step=150, attempt=4)
        """
    )
    runs.start()
    assert runs.finish(240) == 0, runs.errors
    runs.whole()
    assert runs.digest() == undisturbed
    attempts = runs.attempts()
    assert [one["resumed_from"] for one in attempts] == [None, 640, 1920, 3200, 4480]
    assert all("lost the others" in a["reason"] or "died" in a["reason"] for a in attempts[1:])
    assert runs.errors.count("starting again from the last checkpoint") == 4


def test_a_host_dies_and_comes_back(runs: Runs, undisturbed: str) -> None:
    """Fault 4."""
    runs.faults(
        """
        fail_at("generator", lambda: note("begun"), rank=1, step=60, attempt=1)
        fail_at("data", lambda: time.sleep(0.02), rank=1, step=61, attempt=1)
        fail_at("optimizer", lambda: note("again"), rank=0, attempt=2)
        """
    )
    runs.start()
    runs.wait_for("begun")
    host = runs.hosts.workers[1]
    died = now()
    host.kill()
    import time

    time.sleep(6)
    runs.hosts.join(host)
    took_s = runs.wait_for("again", 120) - died
    assert took_s < 40
    assert runs.finish() == 0, runs.errors
    runs.whole()
    assert runs.digest() == undisturbed
