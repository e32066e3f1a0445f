"""Decisions of a cluster's driver: sizes, retries, stragglers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatdist.cluster.policies import (
    Growth,
    Heartbeat,
    Recovery,
    is_worth_resizing,
    largest,
    needs_of,
    num_to_start,
    overdue,
    resolved,
    room_for,
    size_to_launch,
    straggler_report,
    undisturbed_s,
)
from gatdist.common.errors import (
    ClusterError,
    ConfigError,
    DataError,
    StorageUnavailableError,
    TrainingError,
    WorkerLostError,
    rebuilt,
    summary,
)
from gatdist.config import ClusterConfig, load_config
from support import refused

LOST = WorkerLostError("gone")


def test_worker_counts_that_have_a_part_of_each_batch():
    config = load_config("digits", ["cluster.workers=[63, 99]"])  # a batch of 64
    assert [*config.fitting_workers()] == [63, 64]
    canonical = load_config(
        "digits",
        ["cluster.workers=[2, 9]", "run.reduction=canonical", "run.virtual_workers=4"],
    )
    assert [*canonical.fitting_workers()] == [2, 3, 4]
    with refused(ConfigError, "run.global_batch"):
        load_config("digits", ["cluster.workers=[65, 70]"]).fitting_workers()
    with refused(ConfigError, "cluster.workers"):
        load_config("digits", ["cluster.workers=[4, 2]"])


@given(
    st.sets(st.integers(1, 9), min_size=1),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 3),
)
def test_workers_are_started_for_the_largest_size_and_as_spares(sizes, present, room, spares):
    sizes = sorted(sizes)
    more = num_to_start(sizes, present, room, spares)
    assert 0 <= more <= room
    most = largest(sizes, present + room)
    if most is None:
        assert more == 0 or present + more <= spares
    else:
        assert largest(sizes, present + more) == most
        assert more in (0, min(room, most + spares - present))
    assert more == 0 or present + more <= sizes[-1] + spares


def test_spares_are_for_runs_that_continue():
    with refused(ConfigError, "cluster.spares"):
        load_config("digits", ["cluster.spares=1", "cluster.after_loss=restart"])
    with refused(ConfigError, "cluster.spares"):
        resolved(load_config("digits", ["cluster.spares=1"]), {"CPU": 1.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("settings", "needs", "backend", "after_loss"),
    [
        ([], {"CPU": 1.0}, "gloo", "continue"),
        ([], {"CPU": 1.0, "GPU": 1.0}, "nccl", "restart"),
        (["cluster.backend=gloo"], {"CPU": 1.0, "GPU": 1.0}, "gloo", "continue"),
        (["cluster.after_loss=continue"], {"CPU": 1.0, "GPU": 1.0}, "nccl", "continue"),
        (["cluster.after_loss=restart"], {"CPU": 1.0}, "gloo", "restart"),
    ],
)
def test_what_follows_a_loss_depends_on_the_backend(settings, needs, backend, after_loss):
    found = resolved(load_config("digits", settings), needs).cluster
    assert (found.backend, found.after_loss) == (backend, after_loss)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_room_is_what_fits_on_each_host(hosts, cpus, gpus):
    free = [{"CPU": float(c), "GPU": float(g)} for c, g in hosts]
    expected = sum(min(c // cpus, g // gpus if gpus else 99) for c, g in hosts)
    assert room_for({"CPU": float(cpus), "GPU": float(gpus)}, free) == expected


def test_resource_that_a_host_lacks_leaves_no_room():
    assert room_for({"CPU": 1.0, "GPU": 1.0}, [{"CPU": 8.0}]) == 0
    assert room_for({"CPU": 0.1}, [{"CPU": 0.3}]) == 3


def test_largest_fitting_size_is_chosen():
    assert largest([1, 2, 4], 3) == 2
    assert largest([2, 4], 1) is None


def test_resize_must_save_more_than_it_costs():
    assert is_worth_resizing(1, 2, left_s=100, cost_s=20)
    assert not is_worth_resizing(1, 2, left_s=60, cost_s=20)
    assert not is_worth_resizing(2, 2, left_s=1e9, cost_s=1)
    assert not is_worth_resizing(2, 1, left_s=1e9, cost_s=1)


def test_gpus_of_future_hosts_must_be_specified():
    config, asked = ClusterConfig(), ClusterConfig(gpus_per_worker=1)
    assert needs_of(config, {"CPU": 2}) == {"CPU": 1}
    assert needs_of(config, {"CPU": 2, "GPU": 1}, grows=True) == {"CPU": 1, "GPU": 1}
    assert needs_of(asked, {"CPU": 0}, grows=True) == {"CPU": 1, "GPU": 1}
    with refused(ClusterError, "cluster.gpus_per_worker"):
        needs_of(config, {"CPU": 2}, grows=True)


def test_often_disturbed_workers_do_not_stop_for_few_more():
    def is_worth_it(disturbances):
        left_s = undisturbed_s(3600, disturbances)
        return is_worth_resizing(500, 512, left_s, cost_s=60)

    assert undisturbed_s(0, 0) == 3600
    assert undisturbed_s(10, 1) > 1800  # an early disturbance is weak evidence
    assert is_worth_resizing(1, 2, undisturbed_s(10, 1), cost_s=60)
    assert [is_worth_it(count) for count in (0, 1, 9)] == [True, False, False]


def test_unstable_host_is_not_added():
    growth = Growth(patience_s=10)
    seen = [(0, 2), (5, 2), (9, None), (12, 2), (20, 2), (21, 2), (22, 2)]
    decisions = [growth.decide(1, later, left_s=1e6, cost_s=10, at_s=at) for at, later in seen]
    assert decisions == [False, False, False, False, False, False, True]


def test_growth_waits_longer_after_each_failure():
    growth = Growth(patience_s=3, failures=2)
    decisions = [growth.decide(1, 2, left_s=1e6, cost_s=2, at_s=at) for at in (0, 11, 12)]
    assert decisions == [False, False, True]


def test_failures_are_retried_while_the_run_makes_progress():
    recovery = Recovery(max_failures=2)
    for reached in range(0, 6400, 640):
        assert recovery.decide(LOST, reached).retries
    assert recovery.decide(LOST, 5760).retries
    last = recovery.decide(LOST, 5760)
    assert not last.retries
    assert "3 times" in last.reason


def test_first_start_is_immediate_and_later_ones_back_off():
    recovery = Recovery(max_failures=9)
    delays = [recovery.decide(LOST, 0).delay_s for _ in range(9)]
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert recovery.decide(LOST, 64).delay_s == 0


@pytest.mark.parametrize("error", [rebuilt("DataError", "x"), TrainingError("x")])
def test_lasting_failure_is_not_retried(error):
    assert not Recovery(9).decide(error, 0).retries


def test_unavailable_storage_is_retried():
    assert Recovery(1).decide(StorageUnavailableError("down"), 0).retries
    assert not Recovery(0).decide(StorageUnavailableError("down"), 0).retries
    assert isinstance(rebuilt("DataError", "x"), DataError)


def heartbeat(
    rank,
    *,
    phase="generator",
    num_phases=10,
    silent=0.2,
    still=0.2,
    waits=None,
    lengthy=False,
    flight=None,
):
    about = (rank, f"w{rank}", "n", f"a{rank}", 100 + rank, phase, 3, num_phases)
    return Heartbeat(*about, silent, still, waits, lengthy, flight=flight)


def test_workers_that_make_progress_are_no_stragglers():
    assert (
        straggler_report([heartbeat(0), heartbeat(1, still=60)], 5) is None
    )  # the other one makes progress
    assert straggler_report([], 5) is None


def test_silent_worker_is_a_straggler():
    late = straggler_report(
        [heartbeat(0, still=9), heartbeat(1, silent=8, still=9, phase="data")], 5
    )
    assert [one.rank for one in late.workers] == [1]
    assert late.for_s == 8
    for fact in ("worker 1 on w1 (process 101)", "8 s", "'data'", "step 3"):
        assert fact in late.message


def test_worker_that_is_behind_is_a_straggler():
    late = straggler_report(
        [heartbeat(0, still=9), heartbeat(1, num_phases=9, phase="data", still=9.5)], 5
    )
    assert [one.rank for one in late.workers] == [1]
    assert "9 s" in late.message


def test_in_one_phase_the_worker_that_does_not_wait_is_the_straggler():
    late = straggler_report(
        [heartbeat(0, still=9, waits=True), heartbeat(1, still=9, waits=False)], 5
    )
    assert [one.rank for one in late.workers] == [1]
    unknown = straggler_report([heartbeat(0, still=9), heartbeat(1, still=9)], 5)
    assert [one.rank for one in unknown.workers] == [0, 1]


# Launched, started and completed collectives of three workers, and the ones to blame.
FLIGHTS = {
    "one has not launched it": [(12, None, 11), (11, None, 11), (14, None, 11)],
    "one has not completed the one before": [(12, None, 11), (10, None, 10), (12, None, 11)],
    "one device has not reached it": [(14, 12, 11), (13, 11, 11), (12, 12, 11)],
}


@pytest.mark.parametrize("case", FLIGHTS)
def test_worker_that_waits_for_a_stuck_one_is_not_to_blame(case):
    """On a GPU, worker 2 waits in a phase before the others', and not in torch.distributed."""
    phases = [{"num_phases": 9}, {"num_phases": 9}, {"num_phases": 7, "waits": False}]
    stuck = [
        heartbeat(rank, still=9, flight=flight, **phase)
        for rank, (flight, phase) in enumerate(zip(FLIGHTS[case], phases, strict=True))
    ]
    assert [one.rank for one in straggler_report(stuck, 5).workers] == [1]


@pytest.mark.parametrize(
    "flights",
    [
        [(12, None, 11), (12, None, 11)],  # all have launched it: the network, or unknown
        [(11, None, 11), (11, None, 11)],
        [(12, None, 11), None],
    ],
)
def test_where_no_collective_says_who_is_late_the_phases_do(flights):
    late = straggler_report(
        [
            heartbeat(0, still=9, flight=flights[0]),
            heartbeat(1, still=9, num_phases=9, flight=flights[1]),
        ],
        5,
    )
    assert [one.rank for one in late.workers] == [1]


def test_resources_of_a_launch_are_awaited_for_a_limited_time():
    sizes = [1, 2, 4]
    assert size_to_launch(sizes, room=4, capacity=5, waited_s=0, patience_s=3) == 4
    assert size_to_launch(sizes, room=2, capacity=4, waited_s=1, patience_s=3) is None
    assert size_to_launch(sizes, room=2, capacity=4, waited_s=3, patience_s=3) == 2
    assert size_to_launch(sizes, room=0, capacity=4, waited_s=9, patience_s=3) is None
    assert size_to_launch(sizes, room=2, capacity=4, waited_s=0, patience_s=0) == 2  # at the start


@given(st.floats(6, 600), st.integers(0, 3), st.integers(1, 4))
def test_long_phase_of_one_worker_is_no_hang_of_those_that_wait(still, busy, workers):
    heartbeats = [heartbeat(i, still=0.3 if i == busy else still) for i in range(workers)]
    assert (straggler_report(heartbeats, 5) is None) == (busy < workers)


@pytest.mark.parametrize("phase", ["start", "generator", "profile", "commit"])
def test_long_start_or_compile_has_its_own_limit(phase):
    waiting = heartbeat(1, still=300, waits=True)
    assert (
        straggler_report([heartbeat(0, phase=phase, still=300, lengthy=True), waiting], 5, 600)
        is None
    )
    late = straggler_report([heartbeat(0, phase=phase, still=650, lengthy=True), waiting], 5, 600)
    assert late is not None
    assert late.for_s == 50
    silent = straggler_report([heartbeat(0, silent=9, lengthy=True), waiting], 5, 600)
    assert [one.rank for one in silent.workers] == [0], "a process that is stopped is no long phase"


class WorkerError(Exception):
    pass


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "WorkerError"),
        ("one line", "one line"),
        ("what is wrong\n\nadvice\nnumbers 0 1 2", "what is wrong"),
        ("Traceback (most recent call last):\n  File\nValueError: bad\n advice", "ValueError: bad"),
        (
            "ray::train() (pid=3)\n  File x\nKeyError: 'a'\n\nDuring handling\n"
            "my.module.OwnError: the cause\nsecond line\n  third",
            "my.module.OwnError: the cause",
        ),
    ],
)
def test_last_meaningful_line_of_a_failure_is_shown(text, line):
    assert summary(WorkerError(text)) == line


def test_workers_that_do_not_follow_the_others_are_given_up():
    """Unless they work: a step or the start of one may take its time."""
    cluster = ClusterConfig(heartbeat_timeout_s=120, startup_timeout_s=1800)
    ones = [
        heartbeat(0, still=500),  # has arrived
        heartbeat(1, still=119),
        heartbeat(2, still=121),
        heartbeat(3, still=1700, lengthy=True),
        heartbeat(4, still=1900, lengthy=True),
        heartbeat(5, silent=121, lengthy=True),
    ]
    late = [one.actor for one in ones[1:]]
    report = overdue(cluster, late, ones, 900)
    assert report is not None
    assert [one.rank for one in report.workers] == [2, 4, 5]
    assert report.for_s == 1900 - 1680  # without the slack of a lengthy operation
    assert "phase" in report.message
    assert overdue(cluster, late[:1], ones, 900) is None
    # They may have waited for one that was lost until the others began to wait for them.
    assert overdue(cluster, late, ones, 119) is None
