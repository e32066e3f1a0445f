"""A run continues, with the bytes of an undisturbed one, when workers are lost or join."""

import json
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from changing_workers import CANONICAL, Workers, changes, digest, plugin
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.changes import CHANGES_FILE
from gatdist.runs.inspection import describe, inspect
from gatdist.storage import Store
from gatdist.training.loop import run

TOTAL = 960
SETTINGS = [
    f"run.total_samples={TOTAL}",
    *CANONICAL,
    "run.log_every_samples=160",
    "run.checkpoint_every_samples=320",
    "game.penalties={r1={strength=1.0, every_steps=4}, lecam={strength=0.1}}",
    'model.spectral_norm=["discriminator"]',
    "evaluate.every_samples=480",
    'evaluate.metrics=["fid"]',
]

FAST = [s for s in SETTINGS if "canonical" not in s and "virtual" not in s]


def config():
    return load_config("digits", SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config(), LocalCommunicator(torch.device("cpu")), Store(str(folder)))
    return digest(folder)


@pytest.mark.parametrize("victim", ["w0", "w1"])
def test_the_other_worker_goes_on(victim, undisturbed, tmp_path):
    with Workers([1, 2], 2, config(), str(tmp_path)) as workers:
        workers.until(lambda: workers.step_of(victim) > 5)
        workers.kill(victim)
        outcomes = workers.finish()
    assert outcomes.keys() == {"w0", "w1"} - {victim}
    assert digest(tmp_path) == undisturbed


def test_a_replacement_gets_the_state_from_the_others(undisturbed, tmp_path):
    """Of a fixed size, the others wait for it."""
    with Workers([2], 2, config(), str(tmp_path)) as workers:
        workers.until(lambda: workers.step_of("w1") > 5)
        workers.kill("w1")
        new = workers.add()
        outcomes = workers.finish()
        assert outcomes.keys() == {"w0", new}
        ((count, _, undone),) = changes(workers)
    assert (count, undone) == (2, 1)
    assert digest(tmp_path) == undisturbed


def test_workers_join_and_leave_at_the_end_of_a_step(undisturbed, tmp_path):
    """1 → 2 → 4 → 3 → 2 → 3 workers; two that are to join together may join one by one."""
    with Workers([1, 2, 3, 4], 1, config(), str(tmp_path)) as workers:

        def until(count):
            workers.until(lambda: [n for n, _, _ in changes(workers)][-1:] == [count])

        workers.until(lambda: workers.step_of("w0") > 2)
        workers.add()
        until(2)
        for _ in range(2):
            workers.add()
        until(4)
        workers.kill("w1")
        until(3)
        workers.kill("w3")
        until(2)
        workers.add()
        until(3)
        workers.finish()
    assert digest(tmp_path) == undisturbed


def test_survivors_that_are_too_few_save_the_state_when_they_are_to_stop(undisturbed, tmp_path):
    with Workers([2], 2, config(), str(tmp_path)) as workers:
        workers.until(lambda: workers.step_of("w1") > 25)
        workers.kill("w1")
        workers.until(lambda: workers.phase_of("w0") == "members")
        workers.served.stop()
        outcome = workers.finish()["w0"]
    assert outcome["status"] == "interrupted"
    assert outcome["samples_seen"] >= 25 * 16
    with Workers([2], 2, config(), str(tmp_path)) as workers:
        workers.finish()
    assert digest(tmp_path) == undisturbed
    lines = (tmp_path / "attempts.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["resumed_from"] == outcome["samples_seen"]


def test_a_stopped_worker_is_left_behind(undisturbed, tmp_path):
    """The others wait in a collective that nothing but an abort can end."""
    with Workers([1, 2, 3, 4], 4, config(), str(tmp_path)) as workers:
        workers.until(lambda: workers.step_of("w1") > 5)
        workers.kill("w1", signal.SIGSTOP)
        workers.served.lose("w1")
        workers.until(lambda: changes(workers))
        workers.kill("w1", signal.SIGCONT)
        outcomes = workers.finish()
    assert outcomes["w1"].startswith("LeftBehindError")
    assert digest(tmp_path) == undisturbed


def test_all_choose_one_interval_between_checkpoints(undisturbed, tmp_path):
    """Whoever is lost: that of a worker 0 that has just joined or risen, too."""
    chosen = load_config("digits", [*SETTINGS, "run.checkpoint_every_samples=auto"])
    with Workers([1, 2, 3], 3, chosen, str(tmp_path)) as workers:
        workers.until(lambda: workers.step_of("w0") > 12)
        workers.kill("w0")
        workers.until(lambda: changes(workers))
        workers.add()
        workers.until(lambda: [n for n, _, _ in changes(workers)][-1:] == [3])
        workers.kill("w1")
        workers.finish()
    assert digest(tmp_path) == undisturbed


FAULTS = [
    ("data", 1, 3),
    ("generator", 0, 6),
    ("optimizer", 1, 9),
    ("log", 0, 10),
    ("discriminator", 1, 15),
    ("commit", 0, 20),
    ("evaluation", 1, 30),
    ("commit/MANIFEST.json", 0, 40),
    ("evaluation", 0, 60),
]


def faulty(folder, faults):
    (folder / "faults.py").write_text(plugin(faults))
    return load_config("digits", [*SETTINGS, 'plugins=["faults"]'])


def test_killed_at_any_place_and_replaced(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    with Workers([2], 2, faulty(tmp_path, FAULTS), str(run_dir)) as workers:
        for count in range(1, len(FAULTS) + 1):
            workers.until(lambda count=count: len(workers.lose_dead()) >= count)
            workers.add()
            workers.until(lambda count=count: [n for n, _, _ in changes(workers)][-1:] == [2])
        workers.finish()
        found = changes(workers)
    assert sum(undone for _, _, undone in found) <= len(FAULTS)
    assert digest(run_dir) == undisturbed


def test_losses_while_workers_change(undisturbed, tmp_path):
    """Of four workers two are lost, one of them in the change; then one that joins."""
    faults = [("generator", 1, 5), ("members", 2, 5), ("heal", 2, 0)]
    run_dir = tmp_path / "run"
    with Workers([1, 2, 3, 4], 4, faulty(tmp_path, faults), str(run_dir)) as workers:
        workers.until(lambda: changes(workers))
        for _ in range(2):
            workers.add()
        workers.until(lambda: len(workers.lose_dead()) == 3)
        workers.finish()
        found = changes(workers)
    assert found[0][0] == 2
    assert digest(run_dir) == undisturbed


def test_metrics_and_attempts_of_a_run_that_changed_hands(tmp_path):
    run_dir = tmp_path / "run"
    faults = [("discriminator", 0, 29), ("log", 0, 50)]
    with Workers([2], 2, faulty(tmp_path, faults), str(run_dir)) as workers:
        for count in (1, 2):
            workers.until(lambda count=count: len(workers.lose_dead()) == count)
            workers.add()
        workers.finish()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [row["samples_seen"] for row in rows]
    assert seen == list(range(160, TOTAL + 1, 160))
    assert [row["samples_seen"] for row in rows if "metric/fid" in row] == [480, TOTAL]
    lines = (run_dir / "attempts.jsonl").read_text().splitlines()
    attempts = [json.loads(line) for line in lines]
    assert [each["resumed_from"] for each in attempts] == [None, 29 * 16, 50 * 16]
    assert all(each["world_size"] == 2 for each in attempts)


def recorded(run_dir):
    lines = (run_dir / CHANGES_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_changes_are_recorded_and_shown(tmp_path):
    """A worker dies, one joins, and worker 0 dies, so that the one that has joined writes."""
    run_dir = tmp_path / "run"
    faults = [("generator", 1, 10)]
    with Workers([1, 2], 2, faulty(tmp_path, faults), str(run_dir)) as workers:
        workers.until(lambda: len(changes(workers)) == 1)
        new = workers.add()
        workers.until(lambda: len(changes(workers)) == 2 and len(recorded(run_dir)) == 2)
        workers.kill("w0")
        workers.finish()
        events = [fields for kind, fields in workers.served.events() if kind == "members"]
    found = recorded(run_dir)
    assert [(each["before"], each["workers"]) for each in found] == [(2, 1), (1, 2), (2, 1)]
    assert [each["steps_undone"] for each in found][:2] == [1, 0]
    reasons = ["w1 died", f"a worker on {new} joined", "w0 died"]
    assert [each["reason"] for each in found] == reasons
    assert [each["attempt"] for each in found] == [1, 1, 2]
    attempts = map(json.loads, (run_dir / "attempts.jsonl").read_text().splitlines())
    assert [each["reason"] for each in attempts] == ["new", "w0 died"]
    assert found[0]["lost_s"] > found[0]["seconds"] > 0
    assert [{key: each[key] for key in found[0]} for each in events] == found

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        number, seen = int(row["workers/changes"]), row["samples_seen"]
        counted, others = found[:number], found[number:]
        assert all(each["samples_seen"] <= seen for each in counted)
        assert all(each["samples_seen"] >= seen for each in others)
        assert row["workers/steps_undone"] == sum(each["steps_undone"] for each in counted)
        assert row["workers/lost_s"] == pytest.approx(sum(each["lost_s"] for each in counted))

    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    shown = {(one.step, one.value) for one in board.Scalars("workers/changes")}
    assert shown >= {(each["samples_seen"], n + 1.0) for n, each in enumerate(found)}
    shown = {(one.step, one.value) for one in board.Scalars("throughput/workers")}
    assert shown >= {(each["samples_seen"], each["workers"]) for each in found}
    *_, text = board.Tensors("worker_changes/text_summary")
    (text,) = text.tensor_proto.string_val
    assert all(each["reason"] in text.decode() for each in found)
    assert all(each["reason"] in describe(inspect(str(run_dir))) for each in found)


def test_a_change_that_another_loss_interrupts_is_one(tmp_path):
    """Worker 2, of rank 1 by then, dies in the checkpoint that follows the loss of worker 0."""
    run_dir = tmp_path / "run"
    faults = [("generator", 0, 7), ("commit", 1, 7)]
    with Workers([1, 2, 3], 3, faulty(tmp_path, faults), str(run_dir)) as workers:
        workers.finish()
    (found,) = recorded(run_dir)
    assert (found["before"], found["workers"], found["steps_undone"]) == (3, 1, 1)
    assert found["reason"] == "w0 died; w2 died"


def test_a_change_at_the_end_is_recorded(undisturbed, tmp_path):
    """Worker 1 dies while worker 0 writes the last files, which has then nothing left to do."""
    run_dir = tmp_path / "run"
    faults = [("profile", 1, TOTAL // 16)]
    with Workers([1, 2], 2, faulty(tmp_path, faults), str(run_dir)) as workers:
        outcomes = workers.finish()
    assert outcomes["w0"]["status"] == "finished"
    (found,) = recorded(run_dir)
    assert (found["samples_seen"], found["workers"], found["steps_undone"]) == (TOTAL, 1, 0)
    assert digest(run_dir) == undisturbed


def test_fast_reduction_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    """With a fixed number of workers."""
    faults = [("generator", 1, 7), ("discriminator", 0, 21)]
    digests = []
    for number, chosen in enumerate(([], faults)):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = load_config(
            "digits",
            [*FAST, "run.total_samples=640", 'plugins=["faults"]'],
        )
        faulty(folder, chosen)
        with Workers([2], 2, config, str(folder / "run")) as workers:
            for count in range(1, len(chosen) + 1):
                workers.until(lambda count=count: len(workers.lose_dead()) == count)
                workers.add()
            workers.finish()
        digests.append(digest(folder / "run"))
    assert digests[0] == digests[1]
