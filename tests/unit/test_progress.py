"""Progress of a worker, fault injection, and stacks of its threads."""

from __future__ import annotations

import threading

import pytest

import fault_injection
from fault_injection import fail_at
from gatdist.common import position
from gatdist.common.position import here
from gatdist.training.progress import Progress


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in ("rank", "attempt", "step"):
        monkeypatch.setattr(here, name, 0)
    monkeypatch.setattr(position, "hook", None)
    monkeypatch.setattr(fault_injection, "_waiting", [])


def test_each_phase_is_counted():
    progress = Progress()
    for phase in ("data", "discriminator", "data"):
        progress.enter(phase)
    report = progress.report()
    assert (report["phase"], report["num_phases"], report["step"]) == ("data", 3, 0)
    assert 0 <= report["still_s"] < 10


def test_fault_occurs_once_on_its_worker_at_its_step_of_its_attempt():
    came = []
    fail_at("generator", lambda: came.append(here.step), rank=1, step=3, attempt=2)
    progress = Progress()
    for rank, attempt in ((0, 2), (1, 1), (1, 2)):
        here.rank, here.attempt = rank, attempt
        for step in range(6):
            here.step = step
            progress.enter("discriminator")
            progress.enter("generator")
    assert came == [3]


def test_stacks_show_the_training_thread_and_that_it_does_not_wait():
    progress, ready, over = Progress(), threading.Event(), threading.Event()

    def stuck_in_user_code():
        progress.start(0)
        progress.enter("discriminator")
        ready.set()
        over.wait(30)

    thread = threading.Thread(target=stuck_in_user_code, name="training")
    thread.start()
    try:
        assert ready.wait(10)
        found = progress.stacks()
    finally:
        over.set()
        thread.join()
    assert found["text"].startswith("Thread training (trains):")
    assert "stuck_in_user_code" in found["text"]
    assert not found["waits"]
