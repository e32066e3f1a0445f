"""Time with collectives in flight, on the host and on a device that lags behind it."""

from __future__ import annotations

import time
from threading import Thread

import pytest
import torch

from gatdist.monitor.timing import WorkerTimes, find_stragglers
from gatdist.parallel import in_flight
from gatdist.parallel.in_flight import CudaClock, HostClock, InFlight
from support import spawn

SLEEP_S = 0.2


class Event:
    """An event of a fake GPU, which reaches it when the test says so."""

    device_s = 0.0
    made = waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at_s = Event.device_s

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, other: Event) -> float:
        return (other.at_s - self.at_s) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.device_s, Event.made, Event.waits = 100.0, 0, 0


def step(measured: InFlight, compute_s: float, reduce_s: float) -> None:
    """Launch a step with two overlapping buckets and a collective; the host waits for none."""
    first = measured.begin()
    Event.device_s += compute_s
    second = measured.begin()
    Event.device_s += reduce_s
    first.end()
    Event.device_s += 0.25
    second.end()
    Event.device_s += 1.0
    with measured():
        Event.device_s += 0.5


def test_overlapping_collectives_count_once_and_the_step_does_not_wait(gpu):
    measured = InFlight(CudaClock())
    for _ in range(3):
        step(measured, compute_s=2.0, reduce_s=1.0)
    assert Event.waits == 0
    assert measured.take_s() == pytest.approx(3 * (2.0 + 1.0 + 0.25 + 0.5))
    assert measured.take_s() == 0.0
    made = Event.made
    step(measured, compute_s=0.0, reduce_s=1.0)
    assert Event.made == made, "events are used again"
    assert measured.take_s() == pytest.approx(1.75)


def test_collective_that_never_ends_is_not_counted(gpu):
    measured = InFlight(CudaClock())
    measured.begin()
    with measured():
        Event.device_s += 0.5
    assert measured.take_s() == 0.5


def test_many_collectives_use_little_memory(gpu):
    measured = InFlight(CudaClock())
    for _ in range(5 * in_flight._MOST):
        Event.device_s += 1.0
        with measured():
            Event.device_s += 0.25
    assert Event.made <= 2 * in_flight._MOST
    assert measured.take_s() == pytest.approx(5 * in_flight._MOST * 0.25)


def test_straggler_is_found_by_the_time_on_the_device(gpu):
    """The others' collectives wait on their GPUs while their hosts run ahead."""
    seconds = []
    for wait_s in (0.8, 0.8, 0.05, 0.8):
        measured = InFlight(CudaClock())
        with measured():
            Event.device_s += wait_s
        seconds.append({"time/step_s": 1.0, "time/communication_s": measured.take_s()})
    times = [WorkerTimes(f"h{r}", s | {"time/discriminator_s": 1.0}) for r, s in enumerate(seconds)]
    (found,) = find_stragglers(times, 1.5)
    assert found.rank == 2


def test_host_clock_measures_callbacks_of_other_threads():
    measured = InFlight(HostClock())
    interval = measured.begin()
    thread = Thread(target=lambda: (time.sleep(0.05), interval.end()))
    thread.start()
    thread.join()
    assert measured.take_s() >= 0.05


def communication_s(comm, late_rank):
    comm.all_reduce_(torch.ones(1))
    comm.take_communication_s()
    if comm.rank == late_rank:
        time.sleep(SLEEP_S)
    comm.all_to_all(torch.ones(2, 4))
    exchanging = comm.take_communication_s()
    comm.any(False)
    return exchanging, comm.take_communication_s()


def test_waiting_for_a_late_worker_counts_as_communication():
    """In the collectives of canonical runs; others do not count."""
    (waiting, other), (late, _) = spawn(2, communication_s, 1)
    assert waiting > SLEEP_S / 2
    assert late < waiting
    assert other == 0
