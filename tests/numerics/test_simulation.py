"""The simulator compared with closed forms, brute force, and published tables."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.validation import STYLEGAN3, is_inside, published
from gatdist.bench.simulate.fit import Known, Observation, fit
from gatdist.bench.simulate.model import (
    DataFlow,
    Link,
    Phase,
    StepModel,
    Topology,
    buckets,
    expected_maximum,
    hierarchical_s,
    ring_s,
    tree_s,
)
from gatdist.bench.simulate.study import stops_paying

LINK = Link(20e-6, 1e9)
FAST = Link(5e-6, 1e11)

# All-reduces


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 4096])
def test_ring_equals_its_formula(workers):
    p, n = workers, 1e8
    assert ring_s(n, p, LINK) == pytest.approx(2 * (p - 1) * 20e-6 + 2 * (p - 1) / p * n / 1e9)


def test_tree_wins_for_small_messages_and_ring_for_large_ones():
    assert tree_s(1e3, 1024, LINK) < ring_s(1e3, 1024, LINK)
    assert ring_s(1e9, 64, LINK) < tree_s(1e9, 64, LINK)
    assert tree_s(1e9, 1, LINK) == 0


def test_hierarchy_of_one_worker_per_host_or_of_one_host_is_a_ring():
    assert hierarchical_s(1e8, 8, 1, FAST, LINK) == pytest.approx(ring_s(1e8, 8, LINK))
    assert hierarchical_s(1e8, 1, 8, FAST, LINK) == pytest.approx(ring_s(1e8, 8, FAST))


@given(st.floats(1, 1e11), st.integers(1, 5000), st.integers(1, 16))
def test_fastest_algorithm_is_the_minimum(num_bytes, workers, per_host):
    times = {
        name: Topology(per_host, FAST, LINK, name).all_reduce_s(num_bytes, workers)
        for name in ("ring", "tree", "hierarchical", "fastest")
    }
    assert times.pop("fastest") == min(times.values())
    assert (min(times.values()) == 0) == (workers == 1)


# Unequal workers


@pytest.mark.parametrize(
    ("count", "known"),
    [(1, 0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (4, 1.02937537300396)],
)
def test_expected_maximum_equals_closed_forms(count, known):
    assert expected_maximum(count) == pytest.approx(known, abs=1e-12)


def test_expected_maximum_of_many_equals_sampling_and_is_below_its_bound():
    drawn = np.random.default_rng(0).standard_normal((4000, 512)).max(axis=1)
    assert expected_maximum(512) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 4000**0.5)
    for count in (2, 100, 4096, 10**6):
        assert expected_maximum(count) < math.sqrt(2 * math.log(count))


# A step


def model(**more):
    phases = (Phase(2e-3, 40e6), Phase(1e-3, 100e6))
    return StepModel(phases, **{"topology": Topology(1, LINK, LINK, "ring"), **more})


def test_one_worker_takes_the_bare_time():
    parts = model(overhead_s=0.01, deviation=0.05).parts(1, 32)
    assert parts.total == pytest.approx(32 * 3e-3 + 0.01)
    assert parts.communication == parts.stragglers == parts.data == 0


def test_without_overlap_a_step_is_computation_and_two_rings():
    parts = model(overlap=False).parts(8, 32)
    assert parts.total == pytest.approx(32 * 3e-3 + ring_s(40e6, 8, LINK) + ring_s(100e6, 8, LINK))


def test_infinite_bandwidth_leaves_latency_and_no_latency_leaves_nothing():
    endless = Topology(1, Link(1e-3, math.inf), Link(1e-3, math.inf), "ring")
    assert model(topology=endless, overlap=False).parts(8, 32).communication == pytest.approx(28e-3)
    free = Topology(1, Link(0.0, math.inf), Link(0.0, math.inf))
    assert model(topology=free).parts(8, 32).total == pytest.approx(32 * 3e-3)


@settings(deadline=None)
@given(
    st.floats(1e3, 3e9), st.floats(1e5, 1e8), st.floats(0, 2), st.integers(2, 64),
    st.sampled_from(["early", "evenly", "late"]),
)  # fmt: skip
def test_overlap_hides_exactly_what_it_can(num_bytes, bucket_bytes, backward_s, workers, kind):
    topology = Topology(1, LINK, LINK, "ring")
    made = StepModel(
        (Phase(backward_s, num_bytes, 1.0, kind),), topology=topology, bucket_bytes=bucket_bytes
    )
    exposed = float(made.parts(workers, 1).communication)
    sizes = [size for size, count in buckets(num_bytes, bucket_bytes) for _ in range(count)]
    sent_s = [topology.all_reduce_s(size, workers) for size in sizes]
    assert sum(sizes) == pytest.approx(num_bytes)
    assert max(sizes) <= bucket_bytes * (1 + 1e-9)
    # The last bucket can't be hidden; nothing waits for more than all of them.
    assert sent_s[-1] * (1 - 1e-9) <= exposed <= sum(sent_s) * (1 + 1e-9)
    assert exposed >= (sum(sent_s) - backward_s) * (1 - 1e-9)
    if len(sizes) <= 33:  # simulated bucket by bucket
        ready, end = 0.0, 0.0
        for size, taken in zip(sizes, sent_s, strict=True):
            ready += size
            share = min(1.0, ready / num_bytes)
            end = max(end, backward_s * made.phases[0].ready_at(share)) + taken
        assert exposed == pytest.approx(end - backward_s, rel=1e-6, abs=1e-9)


def test_late_gradients_hide_less():
    exposed = {
        kind: float(model_of(kind).parts(8, 32).communication)
        for kind in ("early", "evenly", "late")
    }
    assert exposed["early"] < exposed["evenly"] < exposed["late"]
    for kind, half in (("early", 0.25), ("late", 0.75)):  # a quarter of the time for most of them
        quarter = 0.75 if kind == "early" else 0.25
        assert Phase(1.0, ready=kind).ready_at(quarter) == pytest.approx(half)


def model_of(ready):
    topology = Topology(1, LINK, LINK, "ring")
    return StepModel((Phase(3e-3, 60e6, ready=ready),), topology=topology, bucket_bytes=5e6)


def test_slow_data_limits_a_step_to_its_own_rate():
    flow = DataFlow(1e6, 100e6, None, None, 8)
    parts = model(data=flow).parts(16, 32)
    assert parts.total == pytest.approx(16 * 32 * 1e6 / 100e6)
    assert parts.data > 0
    quick = DataFlow(1e3, 1e12, 1e12, 1e9, 8)
    assert model(data=quick).parts(16, 32).data == 0


# Predictions from two points


def fitted(times, workers=(1, 2), *, shared=True, **more):
    """Return a function of workers: the prediction, and its range."""
    base = StepModel((Phase(1e-3),), **more)

    def step(count, seconds_per_1000):
        local = 1000 / count if shared else 1000
        return Observation(count, local, seconds_per_1000 * (1 if shared else count))

    seen = [step(count, seconds) for count, seconds in zip(workers, times, strict=True)]
    found = fit(base, seen, 1000, 0.01, Known())

    def predict(count):
        parts, (low, high) = found.predict(count, 1000 / count if shared else 1000)
        scale = 1 if shared else count
        return float(parts.total) / scale, (low / scale, high / scale)

    return predict


def test_four_and_eight_gpus_are_predicted_from_one_and_two():
    errors = []
    for table in STYLEGAN3["StyleGAN3-T"].values():
        predict = fitted(table[:2])
        errors += [abs(predict(4)[0] / table[2] - 1), abs(predict(8)[0] / table[3] - 1)]
    assert np.mean(errors) < 0.08
    assert max(errors) < 0.16


def test_80_percent_intervals_contain_80_percent_of_published_times():
    rows = [row for row in published() if row["between"]]
    assert len(rows) == 48
    inside = np.mean([is_inside(row) for row in rows])
    assert 0.75 < inside < 0.95


# Tables of many kinds: seconds for 1,000 samples by workers, with 100 s for one worker.
KINDS = {
    "ideal": lambda p: 100 / p,
    "a little overhead": lambda p: 97 / p + 3,
    "much overhead": lambda p: 70 / p + 30,
    "little speedup": lambda p: 20 / p + 80,
    "a ring": lambda p: 100 / p + 8 * 2 * (p - 1) / p,
    "unequal workers": lambda p: 100 / p * (1 + 0.05 * expected_maximum(p)),
    "a tree": lambda p: 100 / p + 1.0 * math.log2(p),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_many_kinds_are_predicted(kind):
    table = KINDS[kind]
    predict = fitted([table(1), table(2)])
    errors = [abs(predict(p)[0] / table(p) - 1) for p in (4, 8)]
    assert np.mean(errors) < 0.1, errors


@pytest.mark.parametrize("shared", [True, False])
def test_predictions_are_between_the_ideal_and_the_observed(shared):
    predict = fitted([100.0, 51.0], shared=shared)
    times = [predict(p)[0] for p in (2, 4, 8, 16, 32)]
    assert times == sorted(times, reverse=True)
    for p, time in zip((2, 4, 8, 16, 32), times, strict=True):
        low, high = predict(p)[1]
        assert 99 / p < low <= time <= high < 60


def test_batch_per_worker_loses_less_than_a_shared_one():
    assert fitted([100, 53], shared=False)(8)[0] < fitted([100, 53])(8)[0]
    assert fitted([100, 53], shared=False)(8)[0] == pytest.approx(100 / 8 * 1.105, rel=0.05)


def test_more_points_narrow_the_range_and_an_outlier_is_rejected():
    table, workers = KINDS["a little overhead"], (1, 2, 4, 8)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 4))
    many = fitted([table(p) * e for p, e in zip(workers, noise, strict=True)], workers)
    two = fitted([table(1), table(2)])
    assert many(32)[0] == pytest.approx(table(32), rel=0.1)
    (low, high), (low_2, high_2) = many(32)[1], two(32)[1]
    assert high - low < 0.6 * (high_2 - low_2)
    spoiled = [table(p) * (1.25 if p == 4 else 1) for p in (1, 2, 4, 8, 16)]
    assert fitted(spoiled, (1, 2, 4, 8, 16))(32)[0] == pytest.approx(table(32), rel=0.1)


def test_one_point_gives_the_computation_and_a_wide_range():
    predict = fitted([100.0], (1,))
    time, (low, high) = predict(8)
    assert 12.5 < time < 18
    assert high / low > 1.1
    from_eight = fitted([14.0], (8,))
    assert from_eight(8)[0] == pytest.approx(14, rel=0.02)
    assert 80 < from_eight(1)[0] < 112


def test_given_network_is_used_beyond_observed_workers():
    """Two workers of one host give no information on the slow network between hosts."""
    phases = (Phase(1e-3, 200e6),)
    true = StepModel(phases, topology=Topology(2, FAST, Link(20e-6, 1e9)), overlap=True)
    seen = [float(true.parts(p, 1000 / p).total) for p in (1, 2)]
    base = StepModel((Phase(5.0, 200e6),), topology=true.topology)
    points = [Observation(p, 1000 / p, s) for p, s in zip((1, 2), seen, strict=True)]
    found = fit(base, points, 1000, 0.01, Known())
    for p in (4, 8, 16):
        predicted = float(found.predict(p, 1000 / p)[0].total)
        assert predicted == pytest.approx(float(true.parts(p, 1000 / p).total), rel=0.15)


# When to stop adding workers


def test_adding_workers_stops_paying_off_at_the_knee():
    amdahl = [(p, 0.9 / p + 0.1) for p in (1, 2, 4, 8, 16, 32)]
    # S(4) − S(2) = 1.26 for two workers, S(8) − S(4) = 1.63 for four.
    assert stops_paying(amdahl, 0.5) == 4
    assert stops_paying(amdahl, 0.7) == 2
    assert stops_paying([(p, 1 / p) for p in (2, 4, 64)], 0.99) is None
    assert stops_paying([(4, 1.0)], 0.5) is None
    assert stops_paying([(1, 1.0), (2, 1.5)], 0.5) == 1
