"""Stragglers are found by the time that other workers wait."""

from __future__ import annotations

from statistics import median

import hypothesis.strategies as st
from hypothesis import given

from gatdist.monitor.timing import WorkerTimes, find_stragglers


def worker(host, step, communication, **phases):
    return WorkerTimes(
        host,
        {"time/step_s": step, "time/communication_s": communication}
        | {f"time/{phase}_s": seconds for phase, seconds in phases.items()},
    )


def waiting(host):
    """Return a worker that computes for 0.2 s of a step and waits for the slow one otherwise."""
    return worker(host, 1.0, 0.8, data=0.01, discriminator=0.5, generator=0.45, optimizer=0.04)


def test_straggler_is_named_with_its_phase():
    slow_data = worker("c", 1.0, 0.05, data=0.8, discriminator=0.1, generator=0.08, optimizer=0.02)
    (found,) = find_stragglers([waiting("a"), waiting("b"), slow_data, waiting("d")], 1.5)
    assert (found.rank, found.phase) == (2, "data")
    assert "worker 2 on c" in found.message


def test_of_two_workers_the_slower_is_found():
    slow = worker("b", 1.0, 0.1, data=0.01, discriminator=0.5, generator=0.45, optimizer=0.04)
    (found,) = find_stragglers([waiting("a"), slow], 1.5)
    assert (found.rank, found.phase) == (1, "discriminator")


def test_even_workers_and_a_single_one_have_no_straggler():
    even = [worker(h, 1.0, 0.1, data=0.1, discriminator=0.5, generator=0.4) for h in "abcd"]
    assert find_stragglers(even, 1.5) == []
    assert find_stragglers(even[:1], 1.5) == []


def test_worker_with_more_samples_may_take_longer():
    times = [worker("a", 1.0, 0.1, data=0.9)._replace(samples=2)]
    times += [worker("b", 1.0, 0.5, data=0.5)] * 3
    assert find_stragglers(times, 1.5) == []
    (found,) = find_stragglers([times[0]._replace(samples=1), *times[1:]], 1.5)
    assert found.rank == 0
    # With half the samples, the same time is no sign of a slow worker: it may not depend on them.
    assert find_stragglers([times[1], *[times[0]] * 3], 1.5) == []


def test_small_difference_is_not_reported():
    """Twice the others' computation, but a tenth of the step."""
    times = [worker("a", 1.0, 0.9, data=0.1), worker("b", 1.0, 0.8, data=0.2)]
    assert find_stragglers(times, 1.5) == []


SECONDS = st.floats(0.0, 10.0)


@given(st.lists(st.tuples(SECONDS, SECONDS, st.sampled_from([3, 4])), min_size=2, max_size=9))
def test_each_worker_is_compared_with_the_median_of_the_others(rows):
    times = [
        worker(str(n), busy + data + 1, 1.0, data=data, work=busy)._replace(samples=samples)
        for n, (busy, data, samples) in enumerate(rows)
    ]

    def is_late(rank):
        mine, others = times[rank], times[:rank] + times[rank + 1 :]
        usual_s = median(o.busy_s * max(1.0, mine.samples / o.samples) for o in others)
        late_s = mine.busy_s - usual_s
        return mine.busy_s > 1.5 * usual_s and late_s > 0.2 * mine.seconds["time/step_s"]

    found = find_stragglers(times, 1.5)
    assert [each.rank for each in found] == [*filter(is_late, range(len(times)))]
    for each in found:
        mine, others = times[each.rank], times[: each.rank] + times[each.rank + 1 :]
        late = {
            name: mine.seconds[f"time/{name}_s"]
            - median(o.seconds[f"time/{name}_s"] for o in others)
            for name in ("data", "work")
        }
        if max(late.values()) > 0.2 * mine.seconds["time/step_s"]:
            assert late[each.phase] == max(late.values())
