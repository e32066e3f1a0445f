"""Checkpoints are atomic; damage is detected by digest and reported."""

import json
import threading
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatdist.common.errors import CheckpointError, StaleAttemptError, TrainingError
from gatdist.runs import Checkpoints, Retention, RunDirectory, read_checkpoint
from gatdist.runs.checkpoints import Name
from gatdist.storage import Store
from support import refused


def tensors_of(value):
    return {
        "generator/weight": torch.full((3, 2), value),
        "generator/count": torch.tensor(int(value)),
        "optimizer_generator/weight/step": torch.tensor(value),
    }


def clocks(store):
    """Return samples seen of each checkpoint's folder."""
    return [Name.parse(name).samples_seen for name in store.list()]


def folder_of(store, samples_seen):
    """Return the only checkpoint folder with this number of samples."""
    (name,) = [name for name in store.list() if Name.parse(name).samples_seen == samples_seen]
    return name


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def three(store):
    """Write checkpoints of 1, 2 and 3 samples."""
    checkpoints = Checkpoints(store, Retention(newest=3))
    for value in (1.0, 2.0, 3.0):
        checkpoints.save(int(value), tensors_of(value), {"samples_seen": int(value)})
    checkpoints.close()
    return checkpoints


def test_saved_state_is_read_back(three, store):
    newest = three.newest()
    assert newest.name == folder_of(store, 3)
    assert newest.state == {"samples_seen": 3}
    for name, tensor in tensors_of(3.0).items():
        assert torch.equal(newest.tensors[name], tensor)
        assert newest.tensors[name].dtype == tensor.dtype


def test_snapshot_is_taken_immediately(store):
    checkpoints, gate = Checkpoints(store, may_commit=lambda: gate.wait(10)), threading.Event()
    weight = torch.ones(4)
    checkpoints.save(1, {"generator/weight": weight}, {})
    weight.zero_()
    gate.set()
    checkpoints.close()
    assert checkpoints.newest().tensors["generator/weight"].tolist() == [1.0] * 4


def test_hanging_commit_does_not_block(store, monkeypatch):
    monkeypatch.setattr("gatdist.runs.checkpoints._PATIENCE_S", 0.1)
    gate = threading.Event()
    checkpoints = Checkpoints(store, may_commit=lambda: gate.wait(10))
    assert checkpoints.is_free()
    checkpoints.save(1, tensors_of(1.0), {})
    assert not checkpoints.is_free()
    gate.set()
    checkpoints.wait()
    assert checkpoints.is_free()
    checkpoints.close()


def test_only_recent_checkpoints_are_kept_and_uncommitted_folders_are_deleted(store):
    store.publish("000000000/generator.safetensors", b"left by a kill")
    checkpoints = Checkpoints(store, Retention(newest=2))
    for value in (1.0, 2.0, 3.0):
        checkpoints.save(int(value), tensors_of(value), {})
    checkpoints.close()
    assert clocks(store) == [2, 3]


def test_folder_without_manifest_is_ignored(three, store):
    store.delete(f"{folder_of(store, 3)}/MANIFEST.json")
    assert three.newest().state == {"samples_seen": 2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_newest_checkpoint_falls_back_with_a_warning(store, three, damage):
    name = f"{folder_of(store, 3)}/generator.safetensors"
    content = store.read(name)
    if damage == "flip":
        store.publish(name, content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        store.publish(name, content[:-1])
    elif damage == "remove":
        store.delete(name)
    else:
        name = f"{folder_of(store, 3)}/MANIFEST.json"
        store.publish(name, store.read(name)[:-9])
    messages = []
    found = Checkpoints(store, on_damaged=messages.append).newest()
    assert found.state == {"samples_seen": 2}
    assert len(messages) == 1
    assert name in messages[0]


def test_if_all_are_damaged_the_run_does_not_start_over(store, three):
    for name in store.list():
        store.publish(f"{name}/state.json", b"{}")
    with refused(CheckpointError, store.url):
        three.newest()


def test_failed_write_is_raised_at_the_next_call_and_commits_nothing(store):
    def refuse():
        raise TrainingError("stale")

    checkpoints = Checkpoints(store, may_commit=refuse)
    checkpoints.save(1, tensors_of(1.0), {})
    with pytest.raises(TrainingError):
        checkpoints.close()
    assert checkpoints.newest() is None


def test_digest_depends_on_names_dtypes_shapes_and_bytes(store, three):
    base = three.newest()
    digests = {base.digest()}
    for change in (
        lambda t: t | {"generator/weight": t["generator/weight"] + 1},
        lambda t: t | {"generator/weight": t["generator/weight"].reshape(2, 3)},
        lambda t: t | {"generator/weight": t["generator/weight"].view(torch.int32)},
        lambda t: {
            ("discriminator/weight" if k == "generator/weight" else k): v for k, v in t.items()
        },
    ):
        digests.add(type(base)(base.name, base.state, change(base.tensors)).digest())
    assert len(digests) == 5
    assert read_checkpoint(store.child(folder_of(store, 3))).digest() == base.digest()


def test_stale_attempt_is_fenced(store):
    stale, current = RunDirectory(store), RunDirectory(store)
    stale.start_attempt(["a"], None, "new")
    stale.require_current()
    assert current.start_attempt(["a"], None, "new") == 2
    current.require_current()
    with pytest.raises(TrainingError):
        stale.require_current()


def test_incomplete_line_of_attempts_is_skipped(store):
    RunDirectory(store).start_attempt(["a"], None, "new")
    store.append("attempts.jsonl", '{"attempt": 7, "ti')
    assert RunDirectory(store).start_attempt(["a", "b"], 64, "running") == 2
    lines = store.read("attempts.jsonl").decode().splitlines()
    assert json.loads(lines[-1])["attempt"] == 2


@pytest.mark.parametrize("starts", [2, 8])
def test_of_concurrent_starts_exactly_one_is_current(store, starts):
    directories = [RunDirectory(store) for _ in range(starts)]
    barrier = threading.Barrier(starts)

    def start(directory):
        barrier.wait()
        directory.start_attempt(["a"], None, "new")

    threads = [threading.Thread(target=start, args=[each]) for each in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.attempt for each in directories) == list(range(1, starts + 1))
    current = []
    for directory in directories:
        with suppress(StaleAttemptError):
            directory.require_current()
            current.append(directory.attempt)
    assert current == [starts]
    # The next start restores lines of other attempts that one of them lost.
    RunDirectory(store).start_attempt(["a"], None, "new")
    record = [json.loads(line) for line in store.read("attempts.jsonl").splitlines()]
    assert [entry["attempt"] for entry in record] == list(range(1, starts + 2))
    assert len({entry["id"] for entry in record}) == starts + 1


def test_if_two_attempts_get_the_same_number_one_is_fenced(store, monkeypatch):
    """A store that ignores conditional writes: the last writer wins."""

    def careless(self, name, data):
        self.publish(name, data)
        return True

    monkeypatch.setattr(Store, "create", careless)
    one, other = RunDirectory(store), RunDirectory(store)
    one._taken = other._taken = list  # both have read before either writes
    one.attempts = other.attempts = list
    assert one.start_attempt(["a"], None, "new") == other.start_attempt(["b"], None, "new") == 1
    del one._taken, other._taken, one.attempts, other.attempts
    other.require_current()
    with pytest.raises(StaleAttemptError):
        one.require_current()


def test_attempt_never_writes_into_a_folder_of_another(store):
    stale, current = Checkpoints(store), Checkpoints(store)
    current.save(2, tensors_of(2.0), {"of": "current"}, attempt=2)
    current.wait()
    stale.save(2, tensors_of(1.0), {"of": "stale"}, attempt=1)  # it checked the fence earlier
    stale.close()
    first, second = (read_checkpoint(store.child(name)).state["of"] for name in store.list())
    assert (first, second) == ("stale", "current")
    # What one attempt writes twice, after a rollback, are two folders; the last one counts.
    current.save(2, tensors_of(3.0), {"of": "current, again"}, attempt=2)
    current.close()
    assert Checkpoints(store).newest().state == {"of": "current, again"}
    assert len(store.list()) == 1, "what it supersedes is deleted"


def test_names_sort_by_samples_seen_and_attempt():
    names = [
        "000000576",
        "000000640",  # of an earlier version
        "000000640.2",
        "000000640.2-0f3ac21b0001",
        "000000640.2-0f3ac21b000a",
        "000000640.10-00000000000a",
        "1000000000.1-00000000000a",
    ]
    assert [str(name) for name in sorted(map(Name.parse, reversed(names)))] == names
    for other in (
        "",
        "tmp",
        "12",
        "000000640.",
        ".1",
        "000000640.1.2",
        "000000640.x",
        "000000640-a",
    ):
        assert Name.parse(other) is None
    for other in ("000000640.1-", "000000640.1-XYZ", "MANIFEST.json", "٠٠٠٠٠٠٦٤٠", "000000640.1 "):
        assert Name.parse(other) is None


def test_stale_attempt_deletes_nothing_newer(store):
    current, stale = Checkpoints(store, Retention(newest=3)), Checkpoints(store)
    for clock in (1, 3, 4):
        current.save(clock, tensors_of(1.0), {}, attempt=2)
    current.close()
    store.publish("000000005/generator.safetensors", b"the current one is at it")
    stale.save(2, tensors_of(1.0), {}, attempt=1)
    stale.close()
    assert clocks(store) == [1, 2, 3, 4, 5]


def test_best_and_every_nth_are_kept(store):
    kept = Checkpoints(store, Retention(newest=1, best=2, metric="fid", every_samples=10))
    measured = {3: 5.0, 6: 1.0, 9: None, 12: 4.0, 15: 2.0, 18: 3.0, 21: None, 24: 9.0}
    for clock, fid in measured.items():
        metrics = {} if fid is None else {"fid": fid}
        kept.save(clock, tensors_of(1.0), {}, attempt=1, metrics=metrics)
    kept.close()
    # 6 and 15 are the best, 12 and 21 the first after 10 and 20, 24 the newest.
    assert clocks(store) == [6, 12, 15, 21, 24]
    # Another process reads the metrics from the manifests.
    again = Checkpoints(store, Retention(newest=1, best=1))
    again.save(30, tensors_of(1.0), {}, attempt=2)
    again.close()
    assert clocks(store) == [6, 30]


@settings(max_examples=60)
@given(
    clocks=st.sets(st.integers(1, 60), min_size=1),
    fids=st.lists(st.none() | st.floats(0, 9), min_size=60, max_size=60),
    newest=st.integers(1, 4),
    best=st.integers(0, 3),
    every=st.sampled_from([0, 7, 20]),
)
def test_kept_checkpoints_do_not_depend_on_when_pruning_ran(clocks, fids, newest, best, every):
    """Pruning after each checkpoint keeps what pruning once at the end would keep."""
    rule = Retention(newest, best, "fid", every)
    alive, seen = {}, {}
    for clock in sorted(clocks):
        metrics = {} if fids[clock - 1] is None else {"fid": fids[clock - 1]}
        alive[Name(clock)] = seen[Name(clock)] = metrics
        alive = {name: alive[name] for name in rule.kept(alive)}
    assert set(alive) == rule.kept(seen)
    assert len(alive) >= min(newest, len(clocks))
