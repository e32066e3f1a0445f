"""Simulated runs with faults, compared with closed forms and invariants."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from gatdist.bench.simulate.faults import (
    Kind,
    Situation,
    all_lost_s,
    mean_and_spread,
    part_of,
    play,
)
from gatdist.bench.simulate.intervals import best_interval, daly_s
from gatdist.common.reliability import young_s

HOUR = 3600.0
CRASH = Kind("crash", 1 / HOUR, False, 20.0, 100.0, 0.0, 0.0)
RUN = Situation(100 * HOUR, 1, 1, (1.0,), 20.0, 0.0, (CRASH,))
ELASTIC = Situation(
    200 * HOUR, 16, 8, tuple((16 - away) / 16 for away in range(9)), 5.0, 30.0,
    (Kind("host", 16 / (100 * HOUR), True, 10.0, 60.0, 2 * HOUR, 0.0),),
)  # fmt: skip
# After a lost host the others continue.
CONTINUING = replace(
    ELASTIC,
    kinds=(
        replace(ELASTIC.kinds[0], continue_s=2.0, join_s=3.0),
        Kind("driver", 1 / (40 * HOUR), False, 0.0, 60.0, 0.0, 0.0),
    ),
)
FIXED = replace(CONTINUING, min_hosts=16, speeds=(1.0,))


def played(situation, interval_s, repeats=100, seed=0):
    return play(situation, np.array([float(interval_s)]), seed, repeats)


def test_without_faults_a_run_takes_the_time_of_its_steps_and_checkpoints():
    quiet = replace(RUN, kinds=(), write_s=7.0)
    outcome = played(quiet, 1000, repeats=3)
    assert outcome.total == pytest.approx(100 * HOUR + 360 * 20 + 7)
    assert outcome.faults.sum() == 0
    assert outcome.finished.all()


@pytest.mark.parametrize("interval_s", [100, 379, 1500])
def test_mean_time_is_dalys(interval_s):
    """Faults also occur in checkpoints and restarts: a segment takes M e^(R/M) (e^((τ+C)/M) − 1).

    J. T. Daly, 2006, equation 20.
    """
    m, r, c = HOUR, 120.0, 20.0
    segment_s = m * math.exp(r / m) * (math.exp((interval_s + c) / m) - 1)
    expected_s = segment_s * 100 * HOUR / interval_s
    outcome = played(RUN, interval_s, repeats=200)
    error = outcome.total.std() / 200**0.5
    assert outcome.total.mean() == pytest.approx(expected_s, abs=4 * error)
    assert error < 0.004 * expected_s


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(20.0, HOUR), (2.0, 600.0), (60.0, 24 * HOUR)])
def test_best_interval_is_exact_and_near_youngs(cost_s, mtbf_s):
    kind = replace(CRASH, rate_per_s=1 / mtbf_s, detection_s=0.0, restart_s=30.0)
    situation = replace(RUN, snapshot_s=cost_s, kinds=(kind,))
    best, low, high = best_interval(situation, seed=0)
    tries = np.geomspace(cost_s, 20 * mtbf_s, 20_000)
    exact = tries[np.argmin((np.exp((tries + cost_s) / mtbf_s) - 1) / tries)]
    assert best == pytest.approx(exact, rel=0.15)
    assert low < exact < high
    assert best == pytest.approx(young_s(cost_s, mtbf_s), rel=0.2)
    assert daly_s(cost_s, mtbf_s, 30.0) > young_s(cost_s, mtbf_s)


def test_checkpoint_being_written_does_not_count():
    slow = replace(RUN, snapshot_s=0.0, write_s=600.0)
    lost = [played(replace(slow, write_s=w), 600).repeated.mean() for w in (0.0, 300.0, 600.0)]
    assert lost == sorted(lost)
    # Steps are lost back to the last checkpoint: half an interval plus the time of writing.
    faults = played(slow, 600).faults.mean()
    assert lost[2] / faults == pytest.approx(300 + 600, rel=0.2)


def test_next_checkpoint_waits_for_the_last():
    slow = replace(RUN, write_s=600.0)
    assert (played(slow, 10).total == played(slow, 600).total).all()


def test_sufficient_notice_loses_no_work():
    warned = replace(CRASH, notice_s=60.0, detection_s=0.0)
    message = played(replace(RUN, kinds=(warned,), write_s=30.0), 1000)
    assert message.repeated.sum() == 0
    too_short = played(replace(RUN, kinds=(replace(warned, notice_s=40.0),), write_s=30.0), 1000)
    assert too_short.repeated.mean() > 0.05 * RUN.work_s


def test_all_time_is_accounted_for_and_all_work_is_done():
    later = replace(ELASTIC, grows_at_once=False)
    small = replace(CONTINUING, hosts=2, min_hosts=1, speeds=(1.0, 0.5))
    for situation in (RUN, ELASTIC, later, CONTINUING, FIXED, small):
        outcome = played(situation, 900, repeats=30)
        assert outcome.finished.all()
        assert outcome.useful == pytest.approx(situation.work_s)
        for name in ("slower", "repeated", "snapshots", "standing"):
            assert (getattr(outcome, name) >= 0).all(), name
        assert (outcome.goodput < 1).all()


def test_continuing_with_fewer_hosts_is_faster_if_they_are_away_for_long():
    waiting = replace(ELASTIC, min_hosts=16)
    going_on, stopped = played(ELASTIC, 900, 30), played(waiting, 900, 30)
    assert going_on.total.mean() < 0.9 * stopped.total.mean()
    assert stopped.slower.sum() == 0
    assert going_on.slower.sum() > 0
    # With 16 hosts that are away for 2 of 102 hours, some 0.31 are away on average.
    away = going_on.slower.sum() / (going_on.useful.sum() + going_on.slower.sum())
    assert away == pytest.approx(2 / 102, rel=0.25)


def test_adding_hosts_at_restarts_costs_less_if_hosts_change_often():
    busy = replace(ELASTIC.kinds[0], rate_per_s=16 / (10 * HOUR), restart_s=300.0, away_s=600.0)
    at_once = replace(ELASTIC, kinds=(busy,))
    later = replace(at_once, grows_at_once=False)
    assert played(later, 900, 30).total.mean() < played(at_once, 900, 30).total.mean()


def test_workers_that_continue_lose_no_work_but_after_other_faults():
    (host, _) = CONTINUING.kinds
    alone = played(replace(CONTINUING, kinds=(host,)), 900, 30)
    assert alone.faults.sum() > 100
    assert alone.repeated.sum() == 0
    both = played(CONTINUING, 900, 30)
    faults = both.total.mean() / (40 * HOUR)
    # Of the driver's faults each costs half an interval, and the time of writing, on 15.7 hosts.
    assert both.repeated.mean() / faults == pytest.approx(450 + 30, rel=0.15)


def test_time_of_a_fixed_size_is_the_closed_form():
    """A fault costs the longer of absence and detection, D + A e^(−D/A) on average, and joining."""
    (host, _) = FIXED.kinds
    rare = replace(host, rate_per_s=1 / (20 * HOUR), away_s=600.0, detection_s=598.0)
    situation = replace(FIXED, kinds=(rare,), snapshot_s=0.0, work_s=20_000 * HOUR, write_s=0.0)
    outcome = played(situation, HOUR, 8)
    each_s = 600 + 600 / math.e + 3
    assert 1 / outcome.goodput.mean() - 1 == pytest.approx(each_s / (20 * HOUR), rel=0.05)


def test_without_faults_only_checkpoints_cost():
    quiet = replace(CONTINUING, kinds=(), write_s=0.0)
    assert played(quiet, 500, 2).goodput == pytest.approx(500 / (500 + 5))


@pytest.mark.parametrize("min_hosts", [8, 16])
def test_goodput_is_higher_if_workers_continue_and_falls_with_their_losses(min_hosts):
    def goodput(kinds):
        situation = replace(CONTINUING, min_hosts=min_hosts, kinds=kinds)
        return played(situation, 900, 40).goodput.mean()

    host, driver = CONTINUING.kinds
    now = goodput((host, driver))
    assert now > goodput((ELASTIC.kinds[0], driver))
    for change in (
        {"rate_per_s": 3 * host.rate_per_s},
        {"away_s": 3 * host.away_s},
        {"detection_s": 3000.0},
        {"continue_s": 3000.0},
        {"join_s": 1000.0},
    ):
        assert goodput((replace(host, **change), driver)) < now, change


def test_all_workers_are_lost_as_often_as_a_birth_death_process_says():
    rate, away_s = 1 / HOUR, 300.0
    assert all_lost_s(1, rate, away_s) == pytest.approx(HOUR)
    two = (3 * rate + 1 / away_s) / (2 * rate**2)
    assert all_lost_s(2, rate, away_s) == pytest.approx(two)
    assert all_lost_s(3, rate, 1e12) == pytest.approx(HOUR * (1 / 3 + 1 / 2 + 1))
    assert all_lost_s(1000, rate, away_s) == math.inf
    # A run of two hosts loses work that often: half an interval each time.
    host = Kind("host", 2 * rate, True, 0.0, 0.0, away_s, 0.0, continue_s=0.0)
    small = Situation(2000 * HOUR, 2, 1, (1.0, 1.0), 0.0, 0.0, (host,))
    outcome = played(small, 600, 8)
    expected_s = 300 * 2000 * HOUR / two
    assert outcome.repeated.mean() == pytest.approx(expected_s, rel=0.15)
    assert small.losing_mtbf_s == pytest.approx(two)


def test_best_interval_follows_from_the_faults_that_lose_work():
    """Young's formula with the time between restarts, not between faults."""
    best, low, high = best_interval(CONTINUING, seed=0)
    assert CONTINUING.losing_mtbf_s == pytest.approx(40 * HOUR)
    assert best == pytest.approx(young_s(5.0, 40 * HOUR), rel=0.1)
    intervals = young_s(5.0, 40 * HOUR) * np.geomspace(1 / 8, 8, 13)
    # Background writes, which a short interval waits for, are in all of them.
    totals = play(replace(CONTINUING, work_s=4000 * HOUR), intervals, 0, 20)
    goodput = totals.goodput.reshape(-1, 20).mean(axis=1)
    assert low <= intervals[np.argmax(goodput)] * 1.5
    assert high >= intervals[np.argmax(goodput)] / 1.5
    without = replace(CONTINUING, kinds=CONTINUING.kinds[:1])
    assert without.losing_mtbf_s == math.inf


def test_notice_to_the_last_worker_suffices_for_a_checkpoint():
    host = replace(ELASTIC.kinds[0], notice_s=120.0, detection_s=0.0, continue_s=1.0)
    outcome = played(replace(CONTINUING, hosts=1, min_hosts=1, kinds=(host,)), 900, 8)
    assert outcome.faults.sum() > 0
    assert outcome.repeated.sum() == 0
    assert outcome.snapshots.mean() > played(ELASTIC, 900, 8).snapshots.mean() / 2


def test_same_seed_gives_the_same_runs_and_another_seed_others():
    one, same, other = (played(ELASTIC, 900, 8, seed).total for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).all()


def test_run_with_very_many_faults_is_extrapolated_from_a_part():
    situation = replace(RUN, work_s=20_000 * HOUR)
    part, times = part_of(situation)
    assert times == pytest.approx(20_000 / 600)
    mean_s, low_s, high_s = mean_and_spread(played(part, 379, 64), times)
    assert mean_s == pytest.approx(200 * played(RUN, 379, 200).total.mean(), rel=0.005)
    assert low_s < mean_s < high_s < 1.05 * low_s


def test_run_that_fails_faster_than_it_restarts_is_reported_as_endless():
    hopeless = replace(RUN, kinds=(replace(CRASH, rate_per_s=1 / 10.0),))
    outcome = played(hopeless, 100, repeats=2)
    assert not outcome.finished.any()
    assert (outcome.goodput < 0.01).all()


def test_month_of_thousands_of_hosts_is_simulated_within_seconds():
    kinds = (
        Kind("host", 4096 / (4000 * HOUR), True, 30.0, 120.0, 600.0, 0.0),
        Kind("spot", 4096 / (100 * HOUR), True, 0.0, 120.0, 600.0, 120.0),
    )
    speeds = tuple(1 - away / 4096 for away in range(2048))
    month = Situation(720 * HOUR, 4096, 2048, speeds, 1.0, 5.0, kinds, grows_at_once=False)
    began = time.process_time()
    part, _ = part_of(month)
    outcome = played(part, best_interval(month, 0)[0], 64)
    assert time.process_time() - began < 10
    assert 0 < outcome.goodput.mean() < 0.5
