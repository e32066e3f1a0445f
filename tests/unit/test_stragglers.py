"""Who holds the others up is told from times that the others spend waiting."""

from __future__ import annotations

import socket
from contextlib import suppress

import pytest

from gatdist.cluster.network import interfaces
from gatdist.monitor.links import unsent_bytes
from gatdist.monitor.stragglers import WorkerTimes, find_stragglers


def worker(host, step, communication, **phases):
    return WorkerTimes(
        host,
        {"time/step_s": step, "time/communication_s": communication}
        | {f"time/{phase}_s": seconds for phase, seconds in phases.items()},
    )


def waiting(host):
    """A worker that works 0.2 s of a step and waits for the slow one for the rest of it."""
    return worker(host, 1.0, 0.8, data=0.01, discriminator=0.5, generator=0.45, optimizer=0.04)


def test_the_one_that_the_others_wait_for_is_named_with_its_phase():
    slow_data = worker("c", 1.0, 0.05, data=0.8, discriminator=0.1, generator=0.08, optimizer=0.02)
    (found,) = find_stragglers([waiting("a"), waiting("b"), slow_data, waiting("d")], 1.5)
    assert (found.rank, found.phase) == (2, "data")
    assert found.message.startswith("worker 2 on c holds the others up")


def test_of_two_workers_the_slower_is_found():
    slow = worker("b", 1.0, 0.1, data=0.01, discriminator=0.5, generator=0.45, optimizer=0.04)
    (found,) = find_stragglers([waiting("a"), slow], 1.5)
    assert (found.rank, found.phase) == (1, "discriminator")


def test_even_workers_and_a_single_one_are_left_alone():
    even = [worker(h, 1.0, 0.1, data=0.1, discriminator=0.5, generator=0.4) for h in "abcd"]
    assert find_stragglers(even, 1.5) == []
    assert find_stragglers(even[:1], 1.5) == []


def test_a_small_lead_is_no_reason():
    """Twice the others' work, but a tenth of the step."""
    times = [worker("a", 1.0, 0.9, data=0.1), worker("b", 1.0, 0.8, data=0.2)]
    assert find_stragglers(times, 1.5) == []


def test_a_slow_link_is_told_by_what_waits_to_be_sent():
    times = [
        worker("a", 1.0, 0.9, data=0.1)._replace(unsent_bytes=2_000),
        worker("b", 1.0, 0.9, data=0.1)._replace(unsent_bytes=150_000),
        worker("c", 1.0, 0.9, data=0.1),
    ]
    (found,) = find_stragglers(times, 1.5)
    assert (found.rank, found.phase) == (1, "communication")
    assert "worker 1 on b holds the others up: its network is slow, 150 kB wait" in found.message
    receiver = worker("a", 1.0, 0.1, data=0.9)  # slow itself, so that all must wait to send to it
    (found,) = find_stragglers([receiver, times[1]], 1.5)
    assert (found.rank, found.phase) == (0, "data")
    quick = [one._replace(seconds=one.seconds | {"time/communication_s": 0.3}) for one in times]
    assert find_stragglers(quick, 1.5) == []  # nobody waits for it
    assert find_stragglers([times[1]] * 3, 1.5) == []  # as much everywhere


def test_what_waits_to_be_sent_is_seen():
    address = next((own for own in interfaces().values() if not own.startswith("127.")), None)
    if address is None:
        pytest.skip("this machine has no address but loopback")
    with socket.create_server((address, 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            before = unsent_bytes()
            client.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    client.send(bytes(2**16))  # nobody reads
            assert unsent_bytes() > before + 2**14
