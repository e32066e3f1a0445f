"""A step that is interrupted at any of its collectives is undone without a trace."""

import pytest
import torch

from gatdist.common.errors import WorkerLostError
from gatdist.common.seeding import seed_all
from gatdist.config import load_config
from gatdist.game import Phase
from gatdist.game.updates.simultaneous import Simultaneous
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.epochs import StepStart
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

CPU = torch.device("cpu")
SGD = ["optim.generator.name=sgd", "optim.discriminator.name=sgd"]
NO_PENALTIES = "game.penalties={}"
SETTINGS = {
    "alternating": [],
    "several_steps": ["game.num_discriminator_steps=2"],
    "generator_first": ["game.order=generator_first"],
    "simultaneous": ["game.update_rule=simultaneous"],
    "optimistic": ["game.update_rule=optimistic"],
    "extragradient": ["game.update_rule=extragradient"],
    "consensus": ["game.update_rule=consensus", NO_PENALTIES],
    "competitive": ["game.update_rule=competitive", "game.loss=minimax", NO_PENALTIES, *SGD],
    "one_stage": ["game.update_rule=one_stage", "game.loss=nonsaturating"],
    "separate_penalties": [
        "game.lazy_penalties=separate",
        "game.penalties={r1={strength=1.0, every_steps=2}, path_length={strength=1.0}}",
    ],
    "guarded": ["health.atomic=true", "health.spike=skip"],
    "ada": ['game.augmentation={name="ada", adjust_samples=32}'],
    "spectral_norm": ['model.spectral_norm=["generator", "discriminator"]'],
    "batch_norm": [
        *(f'model.{player}={{name="dcgan", width=4}}' for player in ("generator", "discriminator")),
        "data.resolution=16",
        NO_PENALTIES,
    ],
    "float16": ["precision.dtype=float16", NO_PENALTIES],
    "canonical": ["run.reduction=canonical", "run.virtual_workers=4"],
}


class Twins(LocalCommunicator):
    """Two workers with the same samples; a chosen collective fails, and spoils its tensor."""

    def __init__(self):
        super().__init__(CPU)
        self.world_size = 2
        self.calls, self.fails_at = 0, -1

    def _call(self, tensor):
        self.calls += 1
        if self.calls == self.fails_at:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
            raise RuntimeError("gloo: connection closed by peer")

    def all_reduce_(self, tensor):
        self._call(tensor)
        return tensor.mul_(2)

    def all_gather(self, tensor):
        self._call(tensor)
        return torch.stack([tensor, tensor])

    def broadcast_(self, tensor, source=0):
        self._call(tensor)
        return tensor

    def all_to_all(self, rows):
        self._call(rows)
        return torch.stack([rows[0], rows[0]])


class Run:
    def __init__(self, settings):
        few = [
            "run.global_batch=16",
            *(f"model.{p}.width=4" for p in ("generator", "discriminator")),
        ]
        self.config = load_config("digits", [*few, *settings])
        self.comm = Twins()
        side = self.config.data.resolution or 8
        seed_all(0, "networks", 0)
        self.state = TrainState(self.config, self.comm, (1, side, side), 0)
        self.rule = self.state.rule(self.config)
        self.start = StepStart(self.state)
        self.shape = 1, side, side

    def step(self, number):
        total = self.config.step_samples
        generator = torch.Generator().manual_seed(number)
        real = torch.rand(total // 2, *self.shape, generator=generator) * 2 - 1
        positions = torch.arange(0, total, 2) + number * total
        batch = Batch(real, None, positions, number, total)
        self.start.begin()
        train_step(self.state, self.rule, batch, self.config, Statistics(CPU), PhaseTimer(CPU))
        self.start.end()

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.state.tensors().items()}


def require_equal(found, expected):
    different = [n for n, t in expected.items() if not torch.equal(found[n], t)]
    assert not different


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_interrupted_at_any_collective_is_undone_and_repeated(settings):
    undisturbed = Run(settings)
    undisturbed.step(1)
    before, calls = undisturbed.tensors(), undisturbed.comm.calls
    undisturbed.step(2)
    after = undisturbed.tensors()
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
    num_calls = undisturbed.comm.calls - calls
    assert num_calls
    for call in range(1, num_calls + 1):
        run = Run(settings)
        run.step(1)
        run.comm.fails_at = run.comm.calls + call
        with pytest.raises(RuntimeError, match="closed by peer"):
            run.step(2)
        assert run.start.undo()
        require_equal(run.tensors(), before)
        assert not run.start.undo()
        run.step(2)
        require_equal(run.tensors(), after)


def test_a_step_that_communicates_after_its_last_phase_is_not_taken_for_undone(monkeypatch):
    """Its last update can't be undone: the run returns to a checkpoint instead."""

    def phases(self, step):
        yield Phase("first", ("discriminator",), step.batch, self._both, is_last=True)
        yield Phase("second", ("generator",), step.batch, self._both)

    monkeypatch.setattr(Simultaneous, "phases", phases)
    run = Run(["game.update_rule=simultaneous"])
    run.step(1)
    run.comm.fails_at = run.comm.calls + 2
    with pytest.raises(RuntimeError, match="closed by peer"):
        run.step(2)
    with pytest.raises(WorkerLostError):
        run.start.undo()
