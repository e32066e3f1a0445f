"""Hosts come and go: the number of workers follows, and the result does not."""

from __future__ import annotations

import time

import pytest
from host_runs import Runs, now

from benchmarks.hosts import Host
from faulty_runs import CANONICAL, TOTAL
from support import wait_until

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_notice_of_preemption_becomes_a_checkpoint_in_time(runs: Runs, alone, rank: int) -> None:
    """Faults 7 and 8: the host is taken away when its time is over; nothing is lost."""
    runs.faults(f'fail_at("data", lambda: note("begun"), rank={rank}, step=40)')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host, noticed = runs.host_of("begun"), now()
    runs.hosts.drain(host, 12)
    wait_until(lambda: len(runs.attempts()) == 2, "the next launch", timeout_s=300)
    (newest,) = runs.folder.glob(
        f"run/checkpoints/{runs.attempts()[1]['resumed_from']:09d}.*/MANI*"
    )
    assert newest.stat().st_mtime - noticed < 12
    host.kill()
    assert runs.finish() == 0, runs.errors
    runs.whole()
    first, second = runs.attempts()
    assert (first["world_size"], second["world_size"]) == (2, 1)
    assert f"{host.name} will be taken away" in second["reason"]
    assert second["resumed_from"] > 0
    assert second["hosts"] == [other.name for other in runs.hosts.workers if other is not host]
    assert runs.digest() == alone(*CANONICAL)


def test_a_host_that_goes_when_the_work_is_done_costs_nothing(runs: Runs) -> None:
    """Ray Train is still ending the workers: one that was drained goes as soon as it is idle."""
    runs.faults(
        """
        from gatdist.cluster.bridge import Bridge
        report = Bridge.report
        def last(self, what, *given, **options):
            answer = report(self, what, *given, **options)
            if what == "finish":
                note("finished")
                hang()
            return answer
        Bridge.report = last
        """
    )
    runs.start()
    runs.wait_for("finished", timeout_s=300)
    runs.host_of("finished").kill()
    assert runs.finish(300) == 0, runs.errors
    runs.whole()
    assert len(runs.attempts()) == 1


def test_two_one_two_workers(runs: Runs, alone) -> None:
    """Fault 18: a host dies, the run goes on with one, and takes it in when it is back."""
    # So slow with one worker that the growth to two is worth its price.
    runs.faults(
        """
        def wait():
            while not (folder / "joined").exists(): time.sleep(0.1)
        fail_at("data", lambda: note("begun"), rank=1, step=25)
        fail_at("data", wait, step=30, attempt=2)
        for step in range(31, 300):
            fail_at("data", lambda: time.sleep(0.4), step=step, attempt=2)
        """
    )
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.kill()
    wait_until(lambda: len(runs.attempts()) == 2, "a launch with one worker", timeout_s=300)
    runs.hosts.join(host)
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    assert [one["world_size"] for one in runs.attempts()] == [2, 1, 2], runs.errors
    assert "room for 2 workers instead of 1" in runs.attempts()[2]["reason"]
    runs.whole()
    assert runs.digest() == alone(*CANONICAL)


def cut(host: Host, seconds: float) -> None:
    host.cut()
    time.sleep(seconds)
    host.plug()


@pytest.mark.slow
def test_a_short_cut_of_the_network_is_ridden_out(runs: Runs, undisturbed: str) -> None:
    """Fault 14, 5 s."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=1, step=60)')
    runs.start()
    runs.wait_for("begun")
    cut(runs.host_of("begun"), 5)
    assert runs.finish() == 0, runs.errors
    runs.whole()
    assert len(runs.attempts()) == 1, runs.errors
    assert runs.digest() == undisturbed


def test_a_long_cut_of_the_network_is_found_and_the_run_goes_on(runs: Runs, alone) -> None:
    """Fault 14, 60 s: the host that is cut off is given up; the run goes on without it."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=1, step=60)')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host, began = runs.host_of("begun"), now()
    host.cut()
    wait_until(lambda: len(runs.attempts()) == 2, "a launch without it", timeout_s=55)
    assert now() - began < 60
    assert runs.finish() == 0, runs.errors
    runs.whole()
    assert [one["world_size"] for one in runs.attempts()] == [2, 1]
    assert runs.digest() == alone(*CANONICAL)
    assert runs.seen()[-1] == TOTAL
