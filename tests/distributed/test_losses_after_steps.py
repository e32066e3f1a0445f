"""What follows a step is done once, whoever is lost: rows, evaluations, rollbacks, the end."""

import json

import pytest

from changing_workers import Workers, digest, plugin
from gatdist.config import load_config
from gatdist.runs import Checkpoints
from gatdist.storage import Store

TOTAL = 320
SETTINGS = [
    f"run.total_samples={TOTAL}",
    "run.global_batch=16",
    "run.reduction=canonical",
    "run.virtual_workers=4",
    "run.log_every_samples=80",
    "run.checkpoint_every_samples=160",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    "evaluate.every_samples=160",
    'evaluate.metrics=["swd"]',
    "evaluate.features=points",
    "evaluate.num_samples=64",
    'plugins=["faults"]',
]
ROLLS_BACK = ["health.nonfinite=rollback", "evaluate.metrics=[]"]
# A batch of step 12 has no finite gradient; the next one in its place has.
NAN = """
from gatdist.training import loop
def train_step(state, rule, batch, *rest, original=loop.train_step):
    if batch.step == 12 and not batch.noise:
        batch.real.fill_(float("nan"))
    original(state, rule, batch, *rest)
loop.train_step = train_step
"""
ONCE = """
def once(name):
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
"""
LOAD = """
from gatdist.training.run_files import RunFiles
def load(self, original=RunFiles.load_newest):
    if self._state.samples_seen and here.rank == {rank} and once("load"):
        kill()
    return original(self)
RunFiles.load_newest = load
"""
# Worker 2 is lost in a collective whose result worker 1 gets, but worker 0 does not.
HALF = """
from gatdist.training.{module} import {name} as owner
def half(self, *args, original=owner.{function}, **kwargs):
    found = original(self, *args, **kwargs)
    if here.step == {step} and self._comm.world_size == 3:
        if here.rank == 2:
            kill()
        if here.rank == 0:
            raise RuntimeError("gloo: connection closed by peer")
    return found
owner.{function} = half
"""


def finished(folder, count, kills=(), more="", settings=(), after=lambda workers: None):
    """Return the folder of a run of ``count`` workers, some of which are killed."""
    folder.mkdir(exist_ok=True)
    (folder / "faults.py").write_text(plugin([*kills], ONCE + more))
    config, run_dir = load_config("digits", [*SETTINGS, *settings]), folder / "run"
    with Workers([1, 2, 3, 4], count, config, str(run_dir)) as workers:
        after(workers)
        outcomes = workers.finish()
        kinds = [kind for kind, _ in workers.served.events()]
    assert {outcome["status"] for outcome in outcomes.values()} == {"finished"}
    assert kinds[-1] == "done"
    return run_dir


def newest(run_dir):
    return Checkpoints(Store(str(run_dir)).child("checkpoints")).newest()


def rows(run_dir):
    """Return (samples seen, whether evaluated) of each row."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(row["samples_seen"], "metric/swd" in row) for row in map(json.loads, lines)]


ROWS = [(80, False), (160, True), (240, False), (TOTAL, True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return digest(finished(tmp_path_factory.mktemp("undisturbed"), 1))


@pytest.fixture(scope="module")
def undisturbed_rollback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return digest(finished(folder, 1, more=NAN, settings=ROLLS_BACK))


def test_worker_0_lost_at_the_end(undisturbed, tmp_path):
    """After the last collective of the last step."""
    run_dir = finished(tmp_path, 2, [("log", 0, TOTAL // 16)])
    assert digest(run_dir) == undisturbed
    assert newest(run_dir).state["samples_seen"] == TOTAL
    assert rows(run_dir) == ROWS
    evaluated = json.loads((run_dir / "evaluations.json").read_text())
    assert {key.split("/")[0] for key in evaluated} == {"160", f"{TOTAL}"}


def test_a_loss_right_after_a_step(undisturbed, tmp_path):
    """The step is neither undone nor made twice."""
    more = """
from gatdist.training.loop import _Loop
def interrupted(self, original=_Loop._interrupted):
    if here.rank == 1 and here.step == 3:
        kill()
    return original(self)
_Loop._interrupted = interrupted
"""
    assert digest(finished(tmp_path, 2, more=more)) == undisturbed


def test_the_last_checkpoint_without_evaluations(tmp_path):
    run_dir = finished(
        tmp_path, 2, [("commit/MANIFEST.json", 0, TOTAL // 16)], settings=["evaluate.metrics=[]"]
    )
    assert newest(run_dir).state["samples_seen"] == TOTAL
    assert newest(run_dir).state["status"] == "finished"


@pytest.mark.parametrize(
    ("module", "name", "function", "step"),
    [("log_interval", "LogInterval", "summary", 5), ("averaged", "Evaluator", "__call__", 10)],
)
def test_what_worker_0_has_not_completed(module, name, function, step, undisturbed, tmp_path):
    """Worker 1 has, so that it is not done again."""
    more = HALF.format(module=module, name=name, function=function, step=step)
    run_dir = finished(tmp_path, 3, more=more)
    assert digest(run_dir) == undisturbed
    assert rows(run_dir) == ROWS
    evaluated = json.loads((run_dir / "evaluations.json").read_text())
    assert {key.split("/")[0] for key in evaluated} == {"160", f"{TOTAL}"}


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        ([("commit", 0, 0)], ""),
        ([("data", 0, 14)], ""),
        ([], LOAD.format(rank=0)),
        ([], LOAD.format(rank=1)),
    ],
)
def test_losses_around_a_rollback(kills, more, undisturbed_rollback, tmp_path):
    """Before the first checkpoint, in the interval of the bad step, and while going back."""
    run_dir = finished(tmp_path, 2, kills, NAN + more, ROLLS_BACK)
    assert digest(run_dir) == undisturbed_rollback
    assert newest(run_dir).state["rollbacks"] == 1


def test_a_worker_that_joins_becomes_worker_0_at_once(tmp_path):
    """Worker 0 is lost right after it has given its state away."""
    more = """
from gatdist.training.epochs import Epochs
def begin(self, *args, original=Epochs.begin):
    found = original(self, *args)
    if self._members.rank == 0 and once("begin"):
        kill()
    return found
Epochs.begin = begin
"""

    def join(workers):
        workers.until(lambda: workers.step_of("w0") > 2)
        workers.add()

    run_dir = finished(tmp_path, 1, more=more, settings=["run.total_samples=640"], after=join)
    assert newest(run_dir).state["samples_seen"] == 640
