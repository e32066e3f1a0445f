"""Hosts die and return, and the workers on the others continue."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from host_runs import Runs

import gatdist
from faulty_runs import CANONICAL
from support import wait_until

pytestmark = pytest.mark.hosts

# Each worker writes when it begins a step; one that works alone waits for the host to come back.
STEPS = """
def begin():
    with open(folder / "steps", "a") as file:
        file.write(f"{here.step} {time.time()}\\n")
    if here.step > 100 and not (folder / "joined").exists(): time.sleep(0.2)
always_at("data", begin)
"""


def longest_pause_s(folder: Path) -> float:
    """Return the longest time without a new step."""
    lines = [line.split() for line in (folder / "steps").read_text().splitlines()]
    reached, last, longest = -1, 0.0, 0.0
    for step, at in sorted(((int(s), float(t)) for s, t in lines), key=lambda pair: pair[1]):
        if step > reached:
            longest = max(longest, at - last if last else 0.0)
            reached, last = step, at
    return longest


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_dies_and_returns(runs: Runs, reference_digest, rank: int) -> None:
    runs.faults(STEPS + f'\nfail_at("generator", lambda: note("begun"), rank={rank}, step=60)\n')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.kill()
    runs.wait_for_message("continuing with 1 worker")
    time.sleep(6)
    runs.hosts.join(host)
    runs.wait_for_message("continuing with 2 workers")
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)
    # Only another worker 0 begins another attempt.
    assert [one["world_size"] for one in runs.attempts()] == [2, 1][: 2 - rank], runs.errors
    sys.stderr.write(f"longest time without a new step: {longest_pause_s(runs.folder):.1f} s\n")


def test_a_host_is_cut_off_and_comes_back(runs: Runs, reference_digest) -> None:
    """Its worker waits in a collective, until it learns that the others continue without it."""
    runs.faults(STEPS + '\nfail_at("data", lambda: note("begun"), rank=1, step=60)\n')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.cut()
    runs.wait_for_message("continuing with 1 worker", 60)
    time.sleep(3)  # Ray has not yet given it up
    host.plug()
    runs.wait_for_message("continuing with 2 workers", 60)
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)
    assert len(runs.attempts()) == 1
    sys.stderr.write(f"longest time without a new step: {longest_pause_s(runs.folder):.1f} s\n")


def test_a_host_dies_again_and_again(runs: Runs, reference_digest) -> None:
    """Once its worker takes its time to join; meanwhile the other one continues."""
    slow = """
if os.environ.get("GATDIST_JOINS") and (folder / "slow").exists(): time.sleep(8)
"""
    runs.faults(slow + STEPS + '\nfail_at("generator", lambda: note("begun"), rank=1, step=40)\n')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    for number in range(1, 4):
        host = runs.host_of("begun")
        host.kill()
        runs.wait_for_message("(?s)" + ".*".join(["with 1 worker at"] * number), 60)
        if number == 2:
            (runs.folder / "slow").touch()
        runs.hosts.join(host)
        runs.wait_for_message("(?s)" + ".*".join(["with 2 workers at"] * number))
    (runs.folder / "joined").touch()
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)
    assert [one["workers"] for one in runs.changes()] == [1, 2] * 3
    assert longest_pause_s(runs.folder) < 8


def test_a_host_with_other_software_or_data_does_not_join(
    runs: Runs, reference_digest, tmp_path: Path
) -> None:
    """The run continues without it."""
    runs.faults(STEPS + '\nfail_at("generator", lambda: note("begun"), rank=1, step=40)\n')
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.kill()
    runs.wait_for_message("with 1 worker at", 60)
    other = tmp_path / "version.py"
    other.write_text('__version__ = "9.9.9"\n')
    host.disguises[Path(gatdist.__file__).parent / "common/version.py"] = other
    try:
        runs.hosts.join(host)
        runs.wait_for_message(rf"warning: host {host.name} .*9\.9\.9")
        (runs.folder / "joined").touch()
        assert runs.finish(300) == 0, runs.errors
    finally:
        host.disguises.clear()
        host.kill()  # the next test starts with it as usual
        runs.hosts.wait_for(len(runs.hosts.workers))
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)
    assert len(runs.changes()) == 1


def test_of_a_fixed_size_the_run_waits_for_the_host(runs: Runs, undisturbed: str) -> None:
    runs.faults(STEPS + '\nfail_at("optimizer", lambda: note("begun"), rank=1, step=60)\n')
    (runs.folder / "joined").touch()
    runs.start()
    runs.wait_for("begun")
    host = runs.host_of("begun")
    host.kill()
    runs.wait_for_message("The others continue", 60)
    time.sleep(4)
    runs.hosts.join(host)
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == undisturbed
    assert len(runs.attempts()) == 1


def test_the_driver_of_a_run_that_continued_dies(runs: Runs, reference_digest) -> None:
    """The same command resumes from the last checkpoint, as ever."""
    runs.faults(STEPS + '\nfail_at("generator", lambda: note("begun"), rank=0, step=60)\n')
    (runs.folder / "joined").touch()
    runs.start(*CANONICAL, workers="1:2")
    runs.wait_for("begun")
    runs.host_of("begun").kill()
    runs.wait_for_message("continuing with 1 worker")
    wait_until(lambda: max(runs.committed()) > 3000, "a later checkpoint")
    runs.process.kill()
    runs.process.communicate()
    runs.start(*CANONICAL, workers="1:2")
    assert runs.finish(300) == 0, runs.errors
    runs.require_complete()
    assert runs.digest() == reference_digest(*CANONICAL)
