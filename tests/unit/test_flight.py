"""The flight recorder of real process groups says which worker has not reached a collective."""

from __future__ import annotations

import time
from threading import Thread

import pytest
import torch

from gatdist.cluster.policies import Heartbeat, straggler_report
from gatdist.parallel.flight import flight, parse_flight
from gatdist.training.progress import Progress
from support import spawn, wait_until

RECORD = {
    "version": "2.10",
    "pg_status": {
        "0": {
            "last_enqueued_collective": "7",
            "last_started_collective": "6",
            "last_completed_collective": "5",
        }
    },
    "entries": [{"collective_seq_id": n, "profiling_name": "nccl:all_reduce"} for n in range(30)],
}


def stuck(comm, late_rank):
    """Wait in a collective that one worker enters later; return all workers' heartbeats."""
    progress = Progress()
    comm.all_reduce_(torch.ones(1))
    comm.any(False)
    progress.enter("discriminator")
    if comm.rank == late_rank:
        progress.enter("generator")  # as the host of a GPU, which runs ahead of it
        time.sleep(0.5)  # the others wait by then
        found = progress.stacks()
        comm.all_reduce_(torch.ones(3))
    else:
        thread = Thread(target=comm.all_reduce_, args=(torch.ones(3),))
        before = flight()
        thread.start()
        wait_until(lambda: flight().launched > before.launched, "the collective")
        found = progress.stacks()
        thread.join()
    about = {"host": f"w{comm.rank}", "node": "", "actor": "", "pid": comm.rank}
    mine = {"rank": comm.rank, "silent_s": 0.0, "still_s": 9.0, "step": 1, "phase": progress.phase}
    mine |= {"num_phases": progress.num_phases, "waits": False, "flight": found["flight"]}
    return mine | about, found["text"]


def test_worker_that_does_not_reach_a_collective_is_named():
    results = spawn(3, stuck, 1)
    heartbeats = [Heartbeat.parse(fields) for fields, _ in results]
    report = straggler_report(heartbeats, 5.0)
    assert [one.rank for one in report.workers] == [1]
    for rank, (_, text) in enumerate(results):
        assert ("gloo:all_reduce [[3]]" in text) == (rank != 1), text
        assert "gloo:all_reduce [[1]]: over" in text


def test_without_a_group_there_is_no_record():
    assert flight() is None


def test_record_is_shortened():
    found = parse_flight(RECORD)
    assert found[:3] == (7, 6, 5)
    lines = found.text.splitlines()
    assert len(lines) < 25
    assert "nccl:all_reduce" in lines[-1]


@pytest.mark.parametrize(
    "record",
    [
        {},
        [],
        {"pg_status": {}},
        RECORD | {"pg_status": {"0": {}}},
        RECORD | {"pg_status": {"0": None}},
        RECORD | {"entries": None},
        RECORD | {"entries": ["x"]},
    ],
)
def test_other_format_is_ignored(record):
    assert parse_flight(record) is None


def test_the_newest_group_counts():
    """A worker that has just joined has had one, the others several."""
    old, new = RECORD["pg_status"]["0"], dict.fromkeys(RECORD["pg_status"]["0"], "3")
    groups = {"10": new, "9": old, "0": old}
    assert parse_flight(RECORD | {"pg_status": groups})[:3] == (3, 3, 3)


def test_device_that_records_no_start_is_unknown():
    status = RECORD["pg_status"]["0"] | {"last_started_collective": "-1"}
    assert parse_flight(RECORD | {"pg_status": {"0": status}}).started is None
