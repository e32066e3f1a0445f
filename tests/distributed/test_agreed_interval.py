"""All workers write checkpoints at the steps that worker 0 has chosen."""

from typing import ClassVar

from gatdist.config import load_config
from gatdist.storage import Store
from gatdist.training.checkpoint_interval import CheckpointInterval
from gatdist.training.loop import run
from support import spawn

SETTINGS = [
    "run.total_samples=640",
    "run.global_batch=16",
    "run.log_every_samples=32",
    "run.checkpoint_every_samples=auto",
    "run.keep_checkpoints=99",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "evaluate.metrics=[]",
]


class Measured(CheckpointInterval):
    """On each worker another cost, with which it would choose another interval."""

    rank = 0
    chosen: ClassVar[list[int]] = []

    def choose(self, comm, samples_per_s, attempts, trained_s):
        cost_s = (1e-6, 1e-3, 1e3)[self.rank] * 4.0 ** (len(self.chosen) % 5)
        self._stops_s.append(cost_s)
        super().choose(comm, samples_per_s, attempts, trained_s)
        self.chosen.append(self.samples)


def train(comm, folder):
    from gatdist.training import ledger

    Measured.rank, Measured.chosen = comm.rank, []
    ledger.CheckpointInterval = Measured
    run(load_config("digits", SETTINGS), comm, Store(folder))
    return Measured.chosen


def test_all_workers_use_the_interval_of_worker_0(tmp_path):
    first, *others = spawn(3, train, str(tmp_path))
    assert len(first) == 640 // 32
    assert len(set(first)) > 1
    assert others == [first, first]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert 2 <= len(saved) < 640 // 32
