"""Background work: order and errors."""

from __future__ import annotations

import threading

import pytest

from gatdist.common.background import Background
from support import wait_until


def test_work_is_done_in_order_without_blocking_the_caller() -> None:
    gate, done = threading.Event(), []
    background = Background("test")
    background.submit(lambda: gate.wait(10))
    for number in range(99):
        if number == 20:
            gate.set()  # above the limit, a call would block
        background.submit(lambda number=number: done.append(number))
    background.close()
    assert done == list(range(99))


def test_call_blocks_if_too_much_work_is_pending() -> None:
    gate = threading.Event()
    background = Background("test", max_pending=2)
    background.submit(lambda: gate.wait(10))
    background.submit(lambda: None)
    third = threading.Thread(target=lambda: background.submit(lambda: None))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.set()
    third.join(10)
    assert not third.is_alive()
    background.close()


def test_error_is_raised_once_and_stops_further_work() -> None:
    gate, done = threading.Event(), []
    background = Background("test")

    def fail() -> None:
        gate.wait(10)
        raise OSError("the disk is gone")

    background.submit(fail)
    background.submit(lambda: done.append("after"))
    background.check()  # nothing has failed yet
    gate.set()
    with pytest.raises(OSError, match="gone"):
        background.wait()
    background.submit(lambda: done.append("later"))
    background.close()
    assert done == []


def test_duration_of_current_work_is_reported() -> None:
    gate = threading.Event()
    background = Background("test")
    assert background.busy_s == 0.0
    background.submit(lambda: gate.wait(10))
    wait_until(lambda: background.busy_s > 0.05, "the work to take a while")
    gate.set()
    background.wait()
    assert background.busy_s == 0.0
    background.close()
