"""A step that is interrupted at any of its collectives is undone without a trace."""

import math

import pytest
import torch
from torch import nn

from gatdist.common.errors import WorkerLostError
from gatdist.config import load_config
from gatdist.game import Phase
from gatdist.game.updates.simultaneous import Simultaneous
from gatdist.models import register_discriminator, register_generator
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
COUNTING = ['model.generator={name="counting"}', 'model.discriminator={name="counting"}']
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
    "changing_buffers": [*COUNTING, NO_PENALTIES],
    "float16": ["precision.dtype=float16", NO_PENALTIES],
    "canonical": ["run.reduction=canonical", "run.virtual_workers=4"],
}


class Counting(nn.Module):
    """A layer whose calls change its buffers, as those of batch normalization do."""

    def __init__(self, num_inputs, sample_shape):
        super().__init__()
        self.layer = nn.Linear(num_inputs, math.prod(sample_shape))
        self.sample_shape = sample_shape
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x, labels=None):
        x = x.flatten(1)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.1)
            self.count += 1
        return self.layer(x).unflatten(1, self.sample_shape)


class CountingDiscriminator(Counting):
    def __init__(self, sample_shape):
        super().__init__(math.prod(sample_shape), (1,))

    def forward(self, x, labels=None):
        return super().forward(x)[:, 0]


@pytest.fixture(autouse=True)
def _networks():
    register_generator("counting")(
        lambda *, latent_size, sample_shape, num_classes: Counting(latent_size, sample_shape)
    )
    register_discriminator("counting")(
        lambda *, sample_shape, num_classes: CountingDiscriminator(sample_shape)
    )


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
    def __init__(self, settings, comm=None):
        small = ["model.generator.width=4", "model.discriminator.width=4"]
        networks = [] if any(one.startswith("model.generator=") for one in settings) else small
        self.config = load_config("digits", ["run.global_batch=16", *networks, *settings])
        self.comm = comm or Twins()
        side = self.config.data.resolution or 8
        self.shape = 1, side, side
        self.state = TrainState(self.config, self.comm, self.shape, 0)
        self.rule = self.state.rule(self.config)
        self.start = StepStart(self.state)

    def step(self, number, spoil=0.0):
        total, world_size = self.config.step_samples, self.comm.world_size
        generator = torch.Generator().manual_seed(number)
        real = torch.rand(total // world_size, *self.shape, generator=generator) * 2 - 1 + spoil
        positions = torch.arange(0, total, world_size) + number * total
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


@pytest.mark.parametrize("call", [2, 3])
def test_a_step_that_communicates_after_its_last_phase_is_not_taken_for_undone(call, monkeypatch):
    """Its last update can't be undone: the run returns to a checkpoint instead."""

    def phases(self, step):
        yield Phase("first", ("discriminator",), step.batch, self._both, is_last=True)
        yield Phase("second", ("generator",), step.batch, self._both)
        yield Phase("third", ("generator",), step.batch, self._both)

    monkeypatch.setattr(Simultaneous, "phases", phases)
    run = Run(["game.update_rule=simultaneous"])
    run.step(1)
    run.comm.fails_at = run.comm.calls + call
    with pytest.raises(RuntimeError, match="closed by peer"):
        run.step(2)
    with pytest.raises(WorkerLostError):
        run.start.undo()


BATCH_NORM = [
    *(
        f'model.{player}={{name="dcgan", width=4, normalization="batch"}}'
        for player in ("generator", "discriminator")
    ),
    "data.resolution=16",
]


@pytest.mark.parametrize("order", ["discriminator_first", "generator_first"])
@pytest.mark.parametrize("networks", [COUNTING, BATCH_NORM], ids=["counting", "batch_norm"])
def test_an_atomic_step_that_is_not_finite_leaves_no_trace_in_buffers(networks, order):
    run = Run(
        [*networks, NO_PENALTIES, "health.atomic=true", f"game.order={order}"],
        LocalCommunicator(CPU),
    )
    run.step(1)
    buffers = {
        f"{name}/{key}": tensor
        for name, player in run.state.players.items()
        for key, tensor in player.bare.named_buffers()
    }
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    run.step(2, spoil=float("nan"))
    assert before
    require_equal(buffers, before)
    run.step(3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in buffers.items())
    assert all(tensor.isfinite().all() for tensor in run.tensors().values())
