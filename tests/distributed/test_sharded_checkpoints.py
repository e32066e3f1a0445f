"""Workers write and read large checkpoints together: the bytes of an undisturbed run remain."""

import json

import pytest
import torch

from changing_workers import CANONICAL, SMALL_FILES, Workers, changes, digest, plugin
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, checkpoints, sharding
from gatdist.storage import Store
from gatdist.training import writers
from gatdist.training.loop import run
from gatdist.training.state import TrainState
from support import spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
TOTAL, FILE_BYTES = 640, 2**12
SETTINGS = [
    f"run.total_samples={TOTAL}",
    *CANONICAL,
    "run.log_every_samples=160",
    "run.checkpoint_every_samples=160",
    "run.keep_checkpoints=9",
    "evaluate.every_samples=480",
    'evaluate.metrics=["swd"]',
]


def config(*more):
    return load_config("digits", [*SETTINGS, *more])


def layouts(num_workers):
    """Return the files that each worker writes."""
    tensors = TrainState(config(), LOCAL, (1, 8, 8), 0).tensors()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return sharding.layout_of_each(sizes, num_workers)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(sharding, "FILE_BYTES", FILE_BYTES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Of a run with one writer and whole files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before, sharding.FILE_BYTES = sharding.FILE_BYTES, 2**27
    run(config(), LOCAL, Store(str(folder)))
    sharding.FILE_BYTES = before
    return digest(folder)


def train(comm, folder, *more):
    """Train with small files; return those that this worker has written and read, and events."""
    written, read, events = [], [], []
    write_files, read_share = checkpoints.write_files, writers.read_share

    def write(store, tensors, files):
        assert tensors.keys() == {name for names in files.values() for name in names}
        written.extend(files)
        return write_files(store, tensors, files)

    def share(store, entries, mine):
        read.extend(mine)
        return read_share(store, entries, mine)

    sharding.FILE_BYTES = FILE_BYTES
    checkpoints.write_files, writers.read_share = write, share
    try:
        run(config(*more), comm, Store(folder), emit=lambda *event: events.append(event))
    finally:
        checkpoints.write_files, writers.read_share = write_files, read_share
    return written, read, events


def manifests(folder):
    found = sorted((folder / "checkpoints").glob("*/MANIFEST.json"))
    return [json.loads(file.read_text())["files"] for file in found]


def test_each_file_is_written_once_and_read_once(undisturbed, tmp_path):
    """By 3 workers, then by 2, 4 and 1."""
    for number, workers in enumerate([3, 2, 4, 1], 1):
        settings = f"run.total_samples={160 * number}"
        of_each = spawn(workers, train, str(tmp_path), settings)
        expected = layouts(workers)
        for (written, read, _), mine in zip(of_each, expected, strict=True):
            assert sorted(written) == sorted(mine)
            if number > 1:
                assert len(read) < 0.7 * len(manifests(tmp_path)[-1]) or workers == 1
        all_read = sorted(file for _, read, _ in of_each for file in read)
        assert all_read == (sorted(manifests(tmp_path)[-2]) if number > 1 else [])
        assert sum(map(bool, expected)) == workers
    assert [len(files) for files in manifests(tmp_path)] == [len(layouts(1)[0]) + 1] * 4
    assert digest(tmp_path) == undisturbed


def test_what_one_worker_cannot_read_is_damaged_for_all(undisturbed, tmp_path):
    spawn(3, train, str(tmp_path), "run.total_samples=320")
    newest = Checkpoints(Store(str(tmp_path / "checkpoints"))).committed()[-1]
    damaged = tmp_path / "checkpoints" / newest / next(iter(layouts(3)[2]))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (_, _, events), *_ = spawn(3, train, str(tmp_path))
    (start,) = [fields for kind, fields in events if kind == "start"]
    assert start["samples_seen"] == 160
    assert any(damaged.name in fields.get("message", "") for _, fields in events)
    assert digest(tmp_path) == undisturbed


def test_rollback_to_a_sharded_checkpoint(tmp_path):
    settings = ["health.nonfinite=rollback", "run.total_samples=320"]
    of_each = spawn(2, spoiled, str(tmp_path), *settings)
    assert [rollbacks for rollbacks, _ in of_each] == [1, 1]
    assert all(read for _, read in of_each)


def spoiled(comm, folder, *more):
    from gatdist.training import loop

    step, spoils, states = loop.train_step, [True], []

    def once(state, rule, batch, *rest):
        states.append(state)
        if state.samples_seen == 192 and spoils:
            spoils.clear()
            batch.real.fill_(float("nan"))
        step(state, rule, batch, *rest)

    loop.train_step = once
    try:
        _, read, _ = train(comm, folder, *more)
    finally:
        loop.train_step = step
    return states[-1].rollbacks, read


def faulty(folder, faults, more=""):
    (folder / "faults.py").write_text(plugin(faults, SMALL_FILES + more))
    return config('plugins=["faults"]')


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [10, 30], ids=["checkpoint", "evaluation"])
def test_a_worker_dies_while_it_writes_its_files(rank, step, undisturbed, tmp_path):
    """The others write another checkpoint, and the incomplete one does not count."""
    run_dir = tmp_path / "run"
    file = [*layouts(3)[rank]][-1]
    faults = faulty(tmp_path, [(f"commit/{file}", rank, step)])
    with Workers([1, 2, 3], 3, faults, str(run_dir)) as workers:
        workers.finish()
        ((count, seen, _),) = changes(workers)
    assert count == 2
    assert seen >= step * 16
    assert digest(run_dir) == undisturbed
    kept = committed(run_dir)
    assert {160, 320, 480, 640} - {step * 16} <= {*kept}
    assert any(step * 16 <= each <= seen + 16 for each in kept)


def committed(run_dir):
    """Return the samples seen of each checkpoint."""
    names = Checkpoints(Store(str(run_dir / "checkpoints"))).committed()
    return [int(name.partition(".")[0]) for name in names]


DIES_ANEW = """
from gatdist.training.run_files import RunFiles
def die_once(self, original=RunFiles._commit_anew):
    if here.rank == 1: once(kill)()
    original(self)
RunFiles._commit_anew = die_once
"""


def test_a_loss_before_an_abandoned_checkpoint_is_written_anew(undisturbed, tmp_path):
    """Worker 1 dies while it writes, and worker 2 when another checkpoint is to be written."""
    run_dir = tmp_path / "run"
    file = [*layouts(3)[1]][-1]
    faults = faulty(tmp_path, [(f"commit/{file}", 1, 10)], DIES_ANEW)
    with Workers([1, 2, 3], 3, faults, str(run_dir)) as workers:
        assert workers.finish().keys() == {"w0"}
    assert digest(run_dir) == undisturbed
    assert any(160 <= seen < 320 for seen in committed(run_dir))


def test_workers_change_between_sharded_checkpoints(undisturbed, tmp_path):
    """Worker 0 dies before it completes one; one that joins writes and one leaves meanwhile."""
    run_dir = tmp_path / "run"
    faults = faulty(tmp_path, [("commit/MANIFEST.json", 0, 10), ("generator", 1, 22)])
    with Workers([1, 2, 3], 3, faults, str(run_dir)) as workers:
        workers.until(lambda: changes(workers))
        workers.add()
        workers.finish()
    assert digest(run_dir) == undisturbed
