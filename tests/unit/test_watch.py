"""How the driver judges a launch whose workers change, without Ray's processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from gatdist.cluster import watch
from gatdist.cluster.bridge import DriverUpdate
from gatdist.cluster.nodes import Nodes
from gatdist.cluster.policies import Heartbeat, Recovery
from gatdist.config import load_config

TIMES = ["cluster.startup_timeout_s=0.001", "cluster.wait_for_workers_s=0"]


class Bridge:
    def __init__(self):
        self.lost, self.left = [], []

    def lose(self, workers, cause):
        self.lost += workers

    def leave(self, workers, cause):
        self.left += workers


@pytest.fixture
def driver():
    return SimpleNamespace(
        config=load_config("ring", [*TIMES, "cluster.max_failures=1"]),
        continues=True,
        interrupted=False,
        bridge=Bridge(),
        recovery=Recovery(1),
        disturbances=0,
        reached=0,
        needs={"CPU": 1.0},
        sizes=[2],
        left_s=0.0,
        warn=lambda message: None,
    )


def update(*members: str, **given: Any) -> DriverUpdate:
    """Of workers that all have sent heartbeats, each on a node of its own."""
    heartbeats = [
        Heartbeat(rank, "host", f"node-{one}", one, 1, "data", 3, 9, 0.1, 0.1, samples_seen=48)
        for rank, one in enumerate(members)
    ]
    fields = dict.fromkeys(DriverUpdate._fields)
    fields |= {"heartbeats": heartbeats, "members": [*members], "controllers": {0: None}}
    fields |= {"waiting": {}, "late": [], "events": [], "stacks": {}, "is_between": False}
    return DriverUpdate(**fields | {"epoch": 1, "interval_s": 0.5} | given)


def test_a_run_has_started_though_a_worker_was_lost_before_its_first_heartbeat(driver):
    assert watch.Launch(driver, 3)._check(update("a", "c")) is None


def test_workers_that_are_lost_one_after_another_in_one_epoch_are_one_failure(driver):
    launch = watch.Launch(driver, 4)
    assert launch._without({"a"}, update("a", "b", "c", "d"), "worker 0 died") is None
    assert launch._without({"b"}, update("b", "c", "d", is_between=True), "worker 1 died") is None
    assert driver.bridge.lost == ["a", "b"]
    assert launch._without({"c"}, update("c", "d", epoch=2), "worker 0 died") is not None


def test_spares_that_die_are_taken_away_without_a_failure(driver, monkeypatch):
    """Else one would take the place of a lost worker, and the others wait for it."""
    nodes = Nodes(frozenset({"node-a", "node-b"}), {"node-y": 60.0}, {}, {}, {})
    monkeypatch.setattr(watch.Nodes, "now", lambda: nodes)
    monkeypatch.setattr(watch, "dead_actors", lambda actors: {"x"} & {*actors})
    launch = watch.Launch(driver, 2)
    launch._looked -= 9
    waiting = {"x": "node-x", "y": "node-y", "z": "node-z"}
    assert launch._check(update("a", "b", waiting=waiting, is_between=True)) is None
    assert (driver.bridge.lost, driver.bridge.left) == (["x"], ["y"])
    assert driver.disturbances == 0


def test_room_is_filled_once(driver, monkeypatch):
    """Though it seems free until Ray Train has reserved it."""
    nodes = Nodes(frozenset({"n"}), {}, {"n": {"CPU": 3.0}}, {"n": {"CPU": 4.0}}, {})
    monkeypatch.setattr(watch.Nodes, "now", lambda: nodes)
    monkeypatch.setattr(watch, "_JOIN_PATIENCE_S", 0.0)
    driver.sizes, driver.left_s, driver.note = [*range(1, 65)], 1e6, lambda message: None
    launch = watch.Launch(driver, 1)
    started, alive = starts(launch, monkeypatch)
    for _ in range(3):
        launch._check_nodes(update("a"))
    assert started == [1, 3]
    alive.remove(1)  # Ray Train has failed
    launch._check_nodes(update("a"))
    launch._check_nodes(update("a"))
    assert started == [1, 3, 3]


def starts(launch, monkeypatch):
    """Return the numbers of workers that are started, and which runs of Ray Train are alive."""
    started, alive = [], []

    def start(num_workers, reason):
        number = len(started)
        started.append(num_workers)
        alive.append(number)
        train = SimpleNamespace(num_workers=num_workers, is_alive=lambda: number in alive)
        launch._trains.append(train)

    monkeypatch.setattr(launch, "_start", start)
    start(1, "")
    launch._has_started = True
    return started, alive


def test_those_that_do_not_follow_are_looked_up_before_silent_ones(monkeypatch):
    monkeypatch.setattr(watch, "_MOST_SUSPECTS", 2)
    heartbeats = [
        one._replace(silent_s=20.0 + n) for n, one in enumerate(update(*"abcd").heartbeats)
    ]
    found = watch.suspects(update(*"abcd", heartbeats=heartbeats, late=["a"]))
    assert found == ["a", "d"]


def test_each_epoch_that_has_ended_gives_its_workers_the_whole_time(driver, monkeypatch):
    """Though the driver looks too seldom to see that one has begun and ended."""
    now = [100.0]
    nodes = Nodes(frozenset({"node-a", "node-b"}), {}, {}, {}, {})
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.Nodes, "now", lambda: nodes)
    monkeypatch.setattr(watch, "dead_actors", lambda actors: set())
    driver.config = load_config("ring", ["cluster.heartbeat_timeout_s=20"])
    launch = watch.Launch(driver, 2)
    still = [one._replace(still_s=50.0) for one in update("a", "b").heartbeats]
    for at, epoch, lost in [(100, 1, []), (119, 2, []), (138, 2, []), (140, 2, ["b"])]:
        now[0] = float(at)
        ended = update("a", "b", epoch=epoch, heartbeats=still, late=["b"], is_between=True)
        assert launch._check_members(ended, now[0]) is None
        assert driver.bridge.lost == lost
