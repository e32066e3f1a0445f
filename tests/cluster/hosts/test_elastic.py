"""Hosts join and leave: the number of workers follows, and the result does not change."""

from __future__ import annotations

import time

import pytest
from host_runs import Runs, now

from benchmarks.hosts import Host
from faulty_runs import CANONICAL, TOTAL
from support import wait_until

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_preemption_notice_the_others_continue(
    runs: Runs, reference_digest, rank: int
) -> None:
    """Faults 7 and 8: the host's worker leaves at the end of a step."""
    runs.faults(f"""
        fail_at("data", lambda: note("begun"), rank={rank}, step=40)
        def slowly():
            if here.step > 40 and not (folder / "gone").exists(): time.sleep(0.2)
        always_at("data", slowly)
        """)
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    runs.hosts.drain(host, 12)
    runs.wait_for_message("continuing with 1 worker", 10)
    host.kill()
    (runs.folder / "gone").touch()
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    (change,) = runs.changes()
    assert (change["before"], change["workers"], change["steps_undone"]) == (2, 1, 0)
    assert f"{host.name} will be taken away" in change["reason"]
    assert [one["world_size"] for one in runs.attempts()] == [2, 1][: 2 - rank]
    assert runs.digest() == reference_digest(*CANONICAL)


@pytest.mark.slow
def test_preemption_notice_triggers_a_checkpoint_in_time(runs: Runs, reference_digest) -> None:
    """Faults 7 and 8, where the launch ends: the host is removed at its deadline."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=0, step=40)')
    runs.start(*CANONICAL, "cluster.after_loss=restart", workers="1:2")
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
    runs.require_complete()
    first, second = runs.attempts()
    assert (first["world_size"], second["world_size"]) == (2, 1)
    assert f"{host.name} will be taken away" in second["reason"]
    assert second["resumed_from"] > 0
    assert second["hosts"] == [other.name for other in runs.hosts.workers if other is not host]
    assert runs.digest() == reference_digest(*CANONICAL)


def test_host_that_drains_after_the_last_step_does_not_restart_the_run(runs: Runs) -> None:
    """Ray Train is still stopping the workers: a drained host is removed as soon as it is idle."""
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
    runs.require_complete()
    assert len(runs.attempts()) == 1


def test_a_run_grows_beyond_its_first_size(runs: Runs, reference_digest) -> None:
    """Hosts that are added later join at the end of a step."""
    away = runs.hosts.workers[0]
    away.kill()
    runs.hosts.wait_for(len(runs.hosts.workers))
    runs.faults(
        """
        def wait():
            if here.step > 25 and not (folder / "joined").exists(): time.sleep(0.3)
        always_at("data", wait)
        """
    )
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for_message("checkpoint at 640")
    runs.hosts.join(away)
    runs.wait_for_message("continuing with 2 workers")
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    (change,) = runs.changes()
    assert change["steps_undone"] == 0
    assert f"a worker on {away.name}" in change["reason"]
    assert len(runs.attempts()) == 1
    assert runs.digest() == reference_digest(*CANONICAL)


def test_shrink_to_one_worker_and_grow_back_to_two(runs: Runs, reference_digest) -> None:
    """Fault 18, where a loss ends the launch: a host dies, one worker starts, and then two."""
    # So slow with one worker that growing to two pays off.
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
    runs.start(*CANONICAL, "cluster.after_loss=restart", workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.kill()
    wait_until(lambda: len(runs.attempts()) == 2, "a launch with one worker", timeout_s=300)
    runs.hosts.join(host)
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    assert [one["world_size"] for one in runs.attempts()] == [2, 1, 2], runs.errors
    assert "room for 2 workers instead of 1" in runs.attempts()[2]["reason"]
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)


def cut(host: Host, seconds: float) -> None:
    host.cut()
    time.sleep(seconds)
    host.plug()


@pytest.mark.slow
def test_short_network_outage_is_tolerated(runs: Runs, undisturbed: str) -> None:
    """Fault 14, 5 s."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=1, step=60)')
    runs.start()
    runs.wait_for("begun")
    cut(runs.host_of("begun"), 5)
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert len(runs.attempts()) == 1, runs.errors
    assert runs.digest() == undisturbed


def test_long_network_outage_is_detected_and_run_continues_without_the_host(
    runs: Runs, reference_digest
) -> None:
    """Fault 14, 60 s, where a loss ends the launch: the next one is without that host."""
    runs.faults('fail_at("data", lambda: note("begun"), rank=1, step=60)')
    runs.start(*CANONICAL, "cluster.after_loss=restart", workers="1:2")
    runs.wait_for("begun")
    host, began = runs.host_of("begun"), now()
    host.cut()
    wait_until(lambda: len(runs.attempts()) == 2, "a launch without it", timeout_s=55)
    assert now() - began < 60
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert [one["world_size"] for one in runs.attempts()] == [2, 1]
    assert runs.digest() == reference_digest(*CANONICAL)
    assert runs.logged()[-1] == TOTAL
