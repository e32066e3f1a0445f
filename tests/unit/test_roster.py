"""Who the workers of each epoch are."""

from hypothesis import given
from hypothesis import strategies as st

from gatdist.cluster.roster import Roster

AT = ("host", 1)


def arrive(roster, *workers):
    for worker in workers:
        roster.arrive(worker, AT, worker)


def test_survivors_go_on_without_the_lost():
    roster = Roster([1, 2, 3], ["a", "b", "c"])
    assert not roster.has_ended
    roster.lose("b")
    assert roster.has_ended
    arrive(roster, "c")
    assert roster.epoch == 1
    arrive(roster, "a")
    assert roster.epoch == 2
    assert roster.members == ["a", "c"]
    assert [roster.seat(w).rank for w in "ac"] == [0, 1]
    assert roster.seat("b") is None
    assert not roster.is_member("b")


def test_of_a_fixed_size_survivors_wait_for_a_replacement_that_takes_the_vacant_rank():
    roster = Roster([3], ["a", "b", "c"])
    roster.lose("b")
    arrive(roster, "a", "c")
    assert roster.epoch == 1
    arrive(roster, "d")
    assert roster.members == ["a", "d", "c"]


def test_rank_0_is_one_that_stays():
    roster = Roster([3], ["a", "b", "c"])
    roster.lose("a")
    arrive(roster, "b", "c", "d")
    assert roster.members == ["b", "d", "c"]


def test_those_that_have_arrived_wait_for_the_others():
    roster = Roster([1, 2, 3], ["a", "b", "c"])
    assert roster.late == []
    arrive(roster, "a")
    assert roster.late == ["b", "c"]
    arrive(roster, "c")
    roster.lose("b")  # the driver has given it up
    assert roster.members == ["a", "c"]
    assert roster.late == []


def test_joining_is_due_once_there_is_room_and_happens_when_all_arrive():
    roster = Roster([1, 2, 4], ["a", "b"])
    arrive(roster, "c")
    assert not roster.is_due  # three can't work
    arrive(roster, "d")
    assert roster.is_due
    assert not roster.has_ended
    arrive(roster, "a", "b")
    assert roster.members == ["a", "b", "c", "d"]
    assert not roster.is_due


def test_a_spare_waits_until_it_is_needed():
    roster = Roster([1, 2], ["a", "b"])
    arrive(roster, "c")
    assert not roster.is_due
    roster.lose("a")
    arrive(roster, "b")
    assert roster.members == ["b", "c"]


def test_a_worker_leaves_at_the_end_of_a_step():
    roster = Roster([1, 2], ["a", "b"])
    roster.leave("a")
    assert roster.is_due
    arrive(roster, "a", "b")
    assert roster.members == ["b"]
    assert not roster.is_member("a")
    assert not roster.is_due


def test_of_a_fixed_size_a_worker_leaves_once_another_one_has_come():
    roster = Roster([2], ["a", "b"])
    roster.leave("a")
    assert not roster.is_due
    arrive(roster, "c")
    assert roster.is_due
    arrive(roster, "a", "b")
    assert roster.members == ["b", "c"]
    assert not roster.is_member("a")


def test_a_worker_that_is_to_leave_stays_as_long_as_the_others_are_too_few():
    roster = Roster([2], ["a", "b"])
    roster.leave("a")
    roster.lose("b")
    arrive(roster, "a", "c")
    assert sorted(roster.members) == ["a", "c"]
    arrive(roster, "d")
    assert roster.is_due


def test_a_lost_worker_that_comes_back_changes_nothing():
    roster = Roster([1, 2, 3], ["a", "b", "c"])
    roster.lose("b")
    arrive(roster, "a", "c")
    arrive(roster, "b")
    assert not roster.is_due
    assert not roster.has_ended


def test_any_number_of_workers_may_save_the_state():
    roster = Roster([3], ["a", "b", "c"])
    roster.lose("b")
    arrive(roster, "a", "c")
    roster.accept_any_size()
    roster.look()
    assert roster.members == ["a", "c"]


def test_a_worker_for_whom_there_was_no_place_joins_anew():
    """The others have made steps without it."""
    roster = Roster([2, 4], ["a", "b", "c", "d"])
    roster.lose("d")
    arrive(roster, "a", "b", "c")
    assert roster.members == ["a", "b"]
    assert not roster.seat("a").joins
    arrive(roster, "e")
    arrive(roster, "a", "b")
    assert sorted(w for w in roster.members if roster.seat(w).joins) == ["c", "e"]


def test_nobody_works_after_the_end():
    roster = Roster([1, 2], ["a"])
    arrive(roster, "b")
    roster.end()
    assert not roster.is_member("b")


def test_an_epoch_names_what_has_changed_its_workers():
    roster = Roster([1, 2, 3, 4], ["a", "b", "c"])
    roster.lose("b", "worker 1 on host7 died")
    roster.lose("b", "worker 1 is silent")  # of one that is lost already
    roster.lose("x", "a spare died")
    arrive(roster, "d", "a", "c")
    assert roster.seat("a").cause == "worker 1 on host7 died; a worker on d joined"
    roster.leave("d", "host9 will be taken away")
    arrive(roster, "e", "f", "a", "c", "d")
    assert roster.seat("f").cause == "host9 will be taken away; 2 workers joined"
    arrive(roster, "a", "c", "e")
    roster.lose("f", "worker 3 sent no heartbeat")
    assert roster.seat("a").cause == "worker 3 sent no heartbeat"
    roster.lose("f", "worker 3 died")
    arrive(roster, "a", "c", "e")
    assert roster.seat("a").cause == ""


EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "lose", "leave", "stop", "start"]), st.integers(0, 9)),
    max_size=40,
)


@given(st.sets(st.integers(1, 6), min_size=1), EVENTS)
def test_each_epoch_has_whole_seats_and_a_source(sizes, events):
    """Whatever happens: equal views of an epoch, no lost worker in it, rank 0 holds the state."""
    sizes = sorted(sizes)
    names = [f"w{i}" for i in range(sizes[-1])]
    roster, started = Roster(sizes, names), len(names)
    holders = set(names)
    for kind, number in events:
        before, lost = roster.epoch, set(roster.lost)
        worker = f"w{number % started}"
        if kind == "arrive":
            arrive(roster, worker)
        elif kind == "lose":
            roster.lose(worker)
        elif kind == "leave":
            roster.leave(worker)
        elif kind == "start":
            started += 1
            arrive(roster, f"w{started - 1}")
        else:
            roster.accept_any_size()
            roster.look()
            sizes = range(1, sizes[-1] + 1)
        assert lost <= roster.lost
        if roster.is_due and not roster.has_ended:
            assert any(map(roster.is_member, roster._waiting)) or (
                set(roster.members) & roster._leaving
            )
        if roster.epoch == before:
            continue
        assert roster.epoch == before + 1
        members = roster.members
        assert len(members) in sizes
        assert len(set(members)) == len(members)
        assert not roster.lost & set(members)
        assert members[0] in holders
        holders = set(members)
        seats = [roster.seat(worker) for worker in members]
        assert [seat.rank for seat in seats] == list(range(len(members)))
        assert {seat[2:6] == seats[0][2:6] for seat in seats} == {True}
