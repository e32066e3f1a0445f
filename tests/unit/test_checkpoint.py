"""A checkpoint is whole or does not exist; damage is found by digest and told."""

import json
import threading

import pytest
import torch

from gatdist.errors import CheckpointError, TrainingError
from gatdist.runs import Checkpoints, RunDirectory, read_checkpoint
from gatdist.storage import Store


def tensors_of(value):
    return {
        "generator/weight": torch.full((3, 2), value),
        "generator/count": torch.tensor(int(value)),
        "optimizer_generator/weight/step": torch.tensor(value),
    }


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def three(store):
    """Checkpoints of 1, 2 and 3 samples."""
    checkpoints = Checkpoints(store, keep=3)
    for value in (1.0, 2.0, 3.0):
        checkpoints.save(int(value), tensors_of(value), {"samples_seen": int(value)})
    checkpoints.close()
    return checkpoints


def test_what_was_saved_is_read(three):
    newest = three.newest()
    assert newest.name == "000000003"
    assert newest.state == {"samples_seen": 3}
    for name, tensor in tensors_of(3.0).items():
        assert torch.equal(newest.tensors[name], tensor)
        assert newest.tensors[name].dtype == tensor.dtype


def test_the_snapshot_is_taken_at_once(store):
    checkpoints, gate = Checkpoints(store, may_commit=lambda: gate.wait(10)), threading.Event()
    weight = torch.ones(4)
    checkpoints.save(1, {"generator/weight": weight}, {})
    weight.zero_()
    gate.set()
    checkpoints.close()
    assert checkpoints.newest().tensors["generator/weight"].tolist() == [1.0] * 4


def test_only_the_newest_are_kept_and_uncommitted_folders_are_swept(store):
    store.publish("000000000/generator.safetensors", b"left by a kill")
    checkpoints = Checkpoints(store, keep=2)
    for value in (1.0, 2.0, 3.0):
        checkpoints.save(int(value), tensors_of(value), {})
    checkpoints.close()
    assert store.list() == ["000000002", "000000003"]


def test_a_folder_without_a_manifest_does_not_exist(three, store):
    store.delete("000000003/MANIFEST.json")
    assert three.newest().name == "000000002"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_falls_back_loudly(store, three, damage):
    name = "000000003/generator.safetensors"
    content = store.read(name)
    if damage == "flip":
        store.publish(name, content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        store.publish(name, content[:-1])
    elif damage == "remove":
        store.delete(name)
    else:
        name = "000000003/MANIFEST.json"
        store.publish(name, store.read(name)[:-9])
    told = []
    found = Checkpoints(store, on_damaged=told.append).newest()
    assert found.name == "000000002"
    assert len(told) == 1
    assert name in told[0]


def test_when_all_are_damaged_nothing_starts_afresh(store, three):
    for name in store.list():
        store.publish(f"{name}/state.json", b"{}")
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        three.newest()


def test_a_failed_write_is_raised_at_the_next_call_and_commits_nothing(store):
    def refuse():
        raise TrainingError("stale")

    checkpoints = Checkpoints(store, may_commit=refuse)
    checkpoints.save(1, tensors_of(1.0), {})
    with pytest.raises(TrainingError, match="stale"):
        checkpoints.close()
    assert checkpoints.newest() is None


def test_the_digest_sees_names_dtypes_shapes_and_bytes(store, three):
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
    assert read_checkpoint(store.child("000000003")).digest() == base.digest()


def test_a_stale_attempt_is_fenced(store):
    stale, current = RunDirectory(store), RunDirectory(store)
    stale.start_attempt(["a"], None, "new")
    stale.require_current()
    assert current.start_attempt(["a"], None, "new") == 2
    current.require_current()
    with pytest.raises(TrainingError, match=r"attempt 1 on .* is stale: attempt 2"):
        stale.require_current()


def test_a_torn_line_of_attempts_is_passed_over(store):
    RunDirectory(store).start_attempt(["a"], None, "new")
    store.append("attempts.jsonl", '{"attempt": 7, "ti')
    assert RunDirectory(store).start_attempt(["a", "b"], 64, "running") == 2
    lines = store.read("attempts.jsonl").decode().splitlines()
    assert json.loads(lines[-1])["attempt"] == 2
