"""The record of a run's changes of workers, and what shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gatdist.common.position import here
from gatdist.config import HealthConfig, load_config
from gatdist.monitor.metrics import read_metrics
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.members import Members, Membership
from gatdist.runs.changes import CHANGES_FILE, Change, ChangeLog, read_changes, table
from gatdist.runs.inspection import describe, inspect
from gatdist.runs.report import report
from gatdist.training.health import time_lost
from gatdist.training.loop import run

CPU = torch.device("cpu")

LOSS = Change(1, 320, 3, 2, 1, 0.5, 2.0, "worker 1 on host7 died", "2026-12-01T10:00:00Z")
JOIN = Change(1, 640, 2, 3, 0, 1.5, 1.5, "a worker on host8 joined", "2026-12-01T10:01:00Z")


def test_changes_that_were_not_written_are_added_once(run_dir):
    log = ChangeLog(run_dir)
    log.add(LOSS)
    assert not log.is_written
    run_dir.publish(CHANGES_FILE, log.content())
    assert read_changes(run_dir) == [LOSS]
    later = ChangeLog(run_dir, [LOSS, JOIN])
    assert not later.is_written
    ((samples_seen, curves),) = later.take()
    assert samples_seen == JOIN.samples_seen
    assert curves == later.totals() | {"throughput/workers": 3.0}
    assert later.take() == []
    run_dir.publish(CHANGES_FILE, later.content())
    assert read_changes(run_dir) == [LOSS, JOIN]
    assert ChangeLog(run_dir, [LOSS, JOIN]).is_written


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": "two"},
        {"seconds": -1},
        {"lost_s": "long"},
        {"time": "yesterday"},
        {"time": 5},
        {"reason": ["a"]},
        {"samples_seen": None},
    ],
)
def test_damaged_lines_are_skipped(run_dir, wrong):
    lines = [json.dumps(asdict(LOSS)), "{", json.dumps(asdict(JOIN) | wrong), "[]", '{"time": 1}']
    run_dir.publish(CHANGES_FILE, "\n".join(lines).encode())
    assert read_changes(run_dir) == [LOSS]


def test_totals(run_dir):
    expected = {
        "workers/changes": 2.0,
        "workers/steps_undone": 1.0,
        "workers/change_s": 2.0,
        "workers/lost_s": 3.5,
    }
    assert ChangeLog(run_dir, [LOSS, JOIN]).totals() == expected


def test_tables_have_a_row_for_each_change_whatever_the_cause(run_dir):
    odd = replace(JOIN, reason="a|b\n\x1b[2Jc")
    head, rule, *rows = ChangeLog(run_dir, [LOSS, odd]).markdown().splitlines()
    columns = head.count(" | ")
    assert rule.count("---") == columns + 1
    assert [row.replace("\\|", "").count(" | ") for row in rows] == [columns] * 2
    assert "3 → 2" in rows[1]  # the newest is the first
    assert "worker 1 on host7 died" in rows[1]
    lines = table([LOSS, odd]).splitlines()[1:]
    assert len(lines) == 3
    assert "1 step" in lines[1]
    assert not any("\x1b" in line for line in [*rows, *lines])


def changes_at(*minutes, lost_s):
    return [
        replace(LOSS, lost_s=lost_s, time=f"2026-12-01T{m // 60:02d}:{m % 60:02d}:00Z")
        for m in minutes
    ]


def warnings_of(run_dir, changes):
    """Return after which of the changes there is a warning."""
    log, found = ChangeLog(run_dir), []
    for number, change in enumerate(changes):
        log.add(change)
        if message := time_lost(HealthConfig(), *log.lost_shares()):
            assert "health.lost_share" in message
            found.append(number)
    return found


def test_warns_when_changes_take_too_much_of_an_hour(run_dir):
    assert warnings_of(run_dir, changes_at(*range(0, 600, 30), lost_s=100)) == []
    assert warnings_of(run_dir, changes_at(*range(0, 60, 10), lost_s=100)) == [3]


def test_warns_again_after_a_quiet_hour(run_dir):
    times = [*range(0, 60, 10), *range(300, 360, 10)]
    assert warnings_of(run_dir, changes_at(*times, lost_s=100)) == [3, 9]


def test_of_a_long_change_only_the_last_hour_counts(run_dir):
    first, second = changes_at(0, 59, lost_s=7200)
    assert warnings_of(run_dir, [first, second]) == [0]
    log = ChangeLog(run_dir, [first])
    assert log.lost_shares() == (0.0, 1.0)


class Alone(Membership):
    """One worker, whose epoch ends after each of these steps."""

    def __init__(self, *steps):
        self._steps = [*steps]

    def next(self):
        self.cause = f"a reason {self._steps.pop(0)}"
        return LocalCommunicator(CPU)

    def is_due(self):
        return here.step in self._steps[:1]


NETWORK = '{name="mlp", width=8, depth=2}'


def trained(run_dir, total, *steps, settings=()):
    """Train to ``total`` samples; return the events of two kinds."""
    config = load_config(
        "ring",
        [
            f"run.total_samples={total}",
            "run.global_batch=16",
            "run.log_every_samples=32",
            "evaluate.metrics=[]",
            f"model.generator={NETWORK}",
            f"model.discriminator={NETWORK}",
            "monitor.grid_samples=4",
            *settings,
        ],
    )
    members, events = Members(LocalCommunicator(CPU), Alone(*steps), CPU), []
    run(config, members, run_dir, emit=lambda *event: events.append(event))
    return [[fields for kind, fields in events if kind == one] for one in ("members", "warning")]


def test_a_run_records_its_changes_at_any_url_and_over_all_attempts(run_dir, tmp_path):
    found, _ = trained(run_dir, 64, 1, 2)
    assert [each["samples_seen"] for each in found] == [16, 32]
    again, _ = trained(run_dir, 128, 5)
    assert again[0]["totals"]["workers/changes"] == 3.0
    changes = read_changes(run_dir)
    assert [change.reason for change in changes] == ["a reason 1", "a reason 2", "a reason 5"]
    assert [change.attempt for change in changes] == [1, 1, 2]
    rows = read_metrics(run_dir).records
    assert [row["workers/changes"] for row in rows] == [1.0, 2.0, 3.0, 3.0]
    (tmp_path / "events").mkdir()
    for name in run_dir.list("tensorboard"):
        (tmp_path / "events" / name).write_bytes(run_dir.read(f"tensorboard/{name}"))
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    shown = {(one.step, one.value) for one in board.Scalars("workers/changes")}
    assert shown >= {(16, 1.0), (32, 2.0), (80, 3.0), (128, 3.0)}
    last = board.Tensors("worker_changes/text_summary")[-1]
    assert last.step == 80
    assert last.tensor_proto.string_val[0].decode().count("a reason") == 3


def test_warns_once_of_changes_that_take_too_much_time(run_dir):
    _, warnings = trained(run_dir, 64, 1, 2, settings=["health.lost_share=1e-9"])
    assert sum("health.lost_share" in each["message"] for each in warnings) == 1


def test_inspect_and_the_report_show_changes(run_dir):
    trained(run_dir, 64, 1, 2)
    if not run_dir.is_local:
        return
    text = describe(inspect(run_dir.url))
    assert "a reason 1" in text
    assert "1 → 1" in text
    page, _ = report(run_dir.url)
    assert "a reason 2" in page
