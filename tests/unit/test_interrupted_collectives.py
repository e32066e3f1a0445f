"""What follows a step is complete, wherever a lost worker interrupts it.

One worker is enough: a collective of its own fails as if another worker were gone.
"""

import pytest
import torch

from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.members import Members, Membership
from gatdist.runs import Checkpoints
from gatdist.storage import Store
from gatdist.training import loop, run_files
from gatdist.training.run_files import RunFiles

CPU = torch.device("cpu")
SETTINGS = [
    "run.total_samples=96",
    "run.global_batch=16",
    "run.log_every_samples=32",
    "run.checkpoint_every_samples=64",
    "evaluate.every_samples=48",
    'evaluate.metrics=["swd"]',
    "evaluate.features=points",
    "evaluate.num_samples=16",
    "monitor.tensorboard=false",
    "model.latent_size=4",
    *(f'model.{player}={{name="residual", width=4}}' for player in ("generator", "discriminator")),
]


class Again(Membership):
    """The same worker in each epoch."""

    def next(self):
        return LocalCommunicator(CPU)

    def is_due(self):
        return False


class Loss:
    """Fails ``function`` at its first call for which ``when`` is true."""

    def __init__(self, function, when):
        self.has_happened = False
        self._function, self._when = function, when

    def __call__(self, *args, **kwargs):
        if not self.has_happened and self._when(*args):
            self.has_happened = True
            raise RuntimeError("gloo: connection closed by peer")
        return self._function(*args, **kwargs)


def train(folder, *settings):
    config = load_config("digits", [*SETTINGS, *settings])
    comm = Members(LocalCommunicator(CPU), Again(), CPU)
    return loop.run(config, comm, Store(str(folder)))


@pytest.mark.parametrize("seen", [48, 96])
def test_a_checkpoint_is_written_before_its_evaluation(seen, monkeypatch, tmp_path):
    """The last one ends the run."""
    commit = RunFiles.commit

    def interrupted(self, **options):
        is_first = not loss.has_happened and self._ledger.evaluating is not None
        lost.append(is_first and self._state.samples_seen == seen)
        commit(self, **options)

    lost = []
    loss = Loss(run_files.require_equal_replicas, lambda *_: lost[-1])
    monkeypatch.setattr(RunFiles, "commit", interrupted)
    monkeypatch.setattr(run_files, "require_equal_replicas", loss)
    outcome = train(tmp_path / "run", "run.keep_checkpoints=9")
    assert loss.has_happened
    assert outcome["status"] == "finished"
    names = Checkpoints(Store(str(tmp_path / "run/checkpoints"))).committed()
    assert [int(name.partition(".")[0]) for name in names] == [48, 64, 96]


@pytest.mark.parametrize("where", ["before", "midway"])
def test_a_rollback_that_is_interrupted_is_repeated_at_once(where, monkeypatch, tmp_path):
    """Without a step of the state that is to be given up, which is whole until then."""
    happened, states = [], []

    def step(state, rule, batch, *rest, original=loop.train_step):
        if state.samples_seen == 80 and not state.rollbacks:
            batch.real.fill_(float("nan"))
        original(state, rule, batch, *rest)
        happened.append(state.samples_seen)

    def load(self, original=RunFiles.load_newest):
        if self._state.samples_seen:
            happened.append("back")
            states.append([tensor.clone() for tensor in self._state.tensors().values()])
        return original(self)

    def is_back(*_):
        return happened[-1:] == ["back"]

    if where == "before":
        loss = Loss(RunFiles.load_newest, is_back)
        monkeypatch.setattr(RunFiles, "load_newest", lambda self: load(self, loss))
    else:  # after the state was read on worker 0
        loss = Loss(LocalCommunicator.broadcast_, is_back)
        monkeypatch.setattr(LocalCommunicator, "broadcast_", lambda *given: loss(*given))
        monkeypatch.setattr(RunFiles, "load_newest", load)
    monkeypatch.setattr(loop, "train_step", step)
    settings = ["run.total_samples=160", "evaluate.metrics=[]", "health.nonfinite=rollback"]
    train(tmp_path / "run", *settings)
    assert loss.has_happened
    assert happened == [16, 32, 48, 64, 80, 96, "back", "back", 80, 96, 112, 128, 144, 160]
    first, second = states
    assert all(map(torch.equal, first, second))
