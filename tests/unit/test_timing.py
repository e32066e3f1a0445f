"""Step timing with a fake clock."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from gatdist.monitor import timing
from gatdist.monitor.timing import PhaseTimer


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_seconds_per_step_do_not_depend_on_how_often_a_phase_is_entered(clock):
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(4):
        with timer("generator"):
            clock.now += 3.0
        for _ in range(2):
            with timer("optimizer"):
                clock.now += 0.5
        clock.now += 50.0  # between phases
    assert timer.collect(4) == {"time/generator_s": 3.0, "time/optimizer_s": 1.0}


def test_collecting_resets_but_keeps_the_names(clock):
    timer = PhaseTimer(torch.device("cpu"))
    with timer("data"):
        clock.now += 1.0
    timer.collect()
    # Workers reduce these values together, so an idle phase must not be missing on one of them.
    assert timer.collect() == {"time/data_s": 0.0}
    with timer("data"):
        clock.now += 2.0
    assert timer.collect() == {"time/data_s": 2.0}


def test_phases_nest_and_a_failing_one_counts(clock):
    timer = PhaseTimer(torch.device("cpu"))
    with suppress(KeyError), timer("outer"):
        clock.now += 1.0
        with timer("inner"):
            clock.now += 2.0
        raise KeyError
    assert timer.collect() == {"time/inner_s": 2.0, "time/outer_s": 3.0}


def test_unused_timer_reports_nothing():
    assert PhaseTimer(torch.device("cpu")).collect(8) == {}


@pytest.mark.gpu
def test_cuda_phases_measure_the_device_without_waiting_for_it():
    device = torch.device("cuda", 0)
    timer, x = PhaseTimer(device), torch.randn(4096, 4096, device=device)
    for _ in range(2):  # the second round reuses the events of the first
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                with timer("matmul"):
                    for _ in range(20):
                        x = (x @ x).tanh()
                with timer("nothing"):
                    pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seconds = timer.collect(3)
        assert seconds["time/matmul_s"] > 20 * seconds["time/nothing_s"] >= 0
