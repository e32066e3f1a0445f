"""What the driver's mailbox and a worker's way to it say, without Ray's processes."""

import time
from types import SimpleNamespace

import pytest
import ray
import torch

from gatdist.cluster.bridge import Mailbox
from gatdist.cluster.epochs import RosterChannel, RunIsOver
from gatdist.cluster.membership import RosterMembership
from gatdist.cluster.policies import heartbeat_interval_s
from gatdist.cluster.preflight import HostInfo
from gatdist.cluster.ray_train import _Control, _Replacing, _TorchConfig
from gatdist.cluster.roster import Seat
from gatdist.cluster.worker import await_fit
from gatdist.common.errors import ClusterError, TrainingError, WorkerLostError
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.faults import attributed

AT = ("host", 1)
CPU = torch.device("cpu")
ORDERS = {"stop": False, "stacks": 0}


class Direct:
    """A bridge to a mailbox in this process."""

    def __init__(self, mailbox):
        self._mailbox = mailbox

    def report(self, what, *given, timeout_s=None):
        return self._mailbox.report(1, what, *given)

    def emit(self, kind, fields):
        self.report("event", kind, fields)


@pytest.fixture
def mailbox():
    """Of a run of two workers, of which three are the most."""
    mailbox = Mailbox()
    mailbox.take(1, ORDERS)
    mailbox.report(1, "enroll", [2, 3], ["a", "b"])
    return mailbox


def beat(worker, node, **fields):
    where = {"rank": 0, "host": node, "node": node, "actor": worker, "pid": 1, "phase": "data"}
    return where | {"step": 1, "num_phases": 1, "still_s": 0.0, "age_s": 0.0} | fields


def test_errors_of_a_lost_worker_do_not_end_the_run(mailbox):
    """One that was cut off, or stopped, may notice later that another attempt has begun."""
    mailbox.lose(1, ["a"], "worker 0 sent no heartbeat")
    mailbox.report(1, "fail", "StaleAttemptError", "attempt 1 is stale", "a")
    assert mailbox.take(1, ORDERS).failure is None
    mailbox.report(1, "fail", TrainingError.__name__, "not finite", "b")
    assert mailbox.take(1, ORDERS).failure == ("TrainingError", "not finite")


def test_the_others_do_not_wait_for_a_worker_that_can_not_join(mailbox):
    for worker in "cab":
        mailbox.report(1, "arrive", worker, AT, worker)
    assert mailbox.take(1, ORDERS).members == ["a", "b", "c"]
    for worker in "ab":
        mailbox.report(1, "arrive", worker, AT, worker)
    mailbox.report(1, "withdraw", "c")
    update = mailbox.take(1, ORDERS)
    assert (update.members, update.is_between) == (["a", "b"], False)


def test_the_driver_knows_where_spares_are_and_takes_dead_ones_away(mailbox):
    mailbox.report(1, "heartbeats_of_host", [beat("c", "n3")])
    mailbox.report(1, "arrive", "c", AT, "c")
    assert mailbox.take(1, ORDERS).waiting == {"c": "n3"}
    mailbox.lose(1, ["c"], "")
    assert mailbox.take(1, ORDERS).waiting == {}


def test_heartbeats_of_a_host_arrive_together_and_old_ones_do_not_count(mailbox):
    mailbox.lose(1, ["b"], "")
    beats = [beat("a", "n", step=7), beat("b", "n"), beat("c", "n", age_s=3.0)]
    orders = mailbox.report(1, "heartbeats_of_host", beats)
    assert (orders["lost"], orders["epoch"], orders["is_between"]) == (["b"], 1, True)
    mailbox.report(1, "heartbeats_of_host", [beat("a", "n", step=6, age_s=9.0)])
    (mine,) = mailbox.take(1, ORDERS).heartbeats
    assert (mine.actor, mine.step) == ("a", 7)
    assert mine.silent_s < 3


def test_more_hosts_send_heartbeats_less_often(mailbox):
    for hosts, interval_s in [(100, 0.5), (4096, heartbeat_interval_s(4096))]:
        for host in range(hosts):
            mailbox.report(1, "heartbeats_of_host", [beat(f"w{host}", f"n{host}")])
        assert mailbox.take(1, ORDERS).interval_s == interval_s
        orders = mailbox.report(1, "heartbeats_of_host", [beat("w0", "n0")])
        assert orders["interval_s"] == interval_s
    assert interval_s > 5


def test_workers_of_an_epoch_of_any_size_know_that_they_are_to_stop(mailbox):
    """Before they train, which that size may not allow."""
    mailbox.lose(1, ["b"], "")
    channel = RosterChannel(Direct(mailbox), "a")
    channel.arrive(AT)
    assert channel.seat() is None
    mailbox.take(1, ORDERS | {"stop": True})
    assert channel.seat().world_size == 1
    assert channel.stops.is_set()


def test_a_mailbox_that_does_not_answer_is_a_reason_to_start_again():
    class Deaf:
        def report(self, *_, **options):
            raise ray.exceptions.GetTimeoutError

    with pytest.raises(WorkerLostError, match="did not answer"):
        RosterChannel(Deaf(), "a").seat()


def test_the_end_of_the_run_is_no_error_of_user_code():
    config = load_config("ring", ['plugins=["mine"]'])
    with pytest.raises(RunIsOver) as raised:
        raise RunIsOver
    assert attributed(raised.value, config, CPU) is raised.value


def test_what_was_ordered_in_the_last_epoch_does_not_end_the_next_one():
    seats = [Seat(2, 0, 2, AT, {}, joins=True), Seat(3, 0, 1, AT, {})]

    class Channel:
        def arrive(self, meets_at):
            pass

        def seat(self):
            return seats.pop(0)

    epochs = []

    def form(seat):
        epochs.append(membership.epoch)
        if seat.epoch == 2:
            raise ClusterError("workers", "one of them was lost")
        return LocalCommunicator(CPU), lambda: None

    membership = RosterMembership(Channel(), form, lambda: None, lambda: AT)
    membership.next()
    assert epochs == [2, 3]
    assert membership.joins  # since the last epoch that has formed


def test_a_replacement_that_dies_as_it_starts_is_tried_again(mailbox):
    """Ray Train ends all workers after other errors."""
    from ray.train.v2._internal.execution.failure_handling.default import (
        RETRYABLE_CONTROLLER_ERRORS,
    )

    class Dead:
        def execute(self, *_):
            raise ray.exceptions.RayActorError

    with pytest.raises(RETRYABLE_CONTROLLER_ERRORS):
        _Replacing().on_start(Dead(), _TorchConfig(bridge=Direct(mailbox), sizes=(2,), joins=True))


def test_a_controller_whose_launch_is_over_ends(mailbox, monkeypatch):
    """The driver has not known of it: it would start workers beside those of the next launch."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="me"))
    control = _Control(Direct(mailbox), 3)
    control.after_controller_start(None)
    assert mailbox.take(1, ORDERS).controllers == {3: "me"}
    mailbox.take(2, ORDERS)
    with pytest.raises(WorkerLostError):
        control.after_controller_start(None)


def host(name, *, storage="", version="2.13", clock_s=0.0):
    return HostInfo(name, name, {"torch": version}, time.time() + clock_s, "", storage)


@pytest.mark.parametrize("fault", [{"storage": "unreachable"}, {"clock_s": 900.0}])
def test_a_worker_whose_host_does_not_fit_joins_once_it_does(fault, mailbox, monkeypatch):
    monkeypatch.setattr("gatdist.cluster.worker._LOOK_AT_HOST_S", 0.0)
    mailbox.report(1, "examined", [host("a"), host("b")])
    looks = iter([host("c", **fault), host("c", **fault), host("c")])
    assert await_fit(Direct(mailbox), lambda: next(looks), exact=False)
    assert [kind for kind, _ in mailbox.take(1, ORDERS).events] == ["warning"]
    hosts, _ = mailbox.report(1, "examined", [])
    assert [one.host for one in hosts] == ["a", "b", "c"]


def test_a_worker_with_other_software_waits_until_the_run_is_over(mailbox, monkeypatch):
    monkeypatch.setattr("gatdist.cluster.worker._LOOK_AT_HOST_S", 0.0)
    mailbox.report(1, "examined", [host("a"), host("b")])
    looked = []

    def look():
        if looked:
            mailbox.report(1, "finish", {"status": "finished"})
        looked.append(True)
        return host("c", version="2.12")

    assert not await_fit(Direct(mailbox), look, exact=False)
    assert len(looked) == 2
