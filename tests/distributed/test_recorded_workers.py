"""Several workers with recorded steps compute what one worker computes without recording.

Communication stays outside of the recordings. Real process groups; recordings are those of
:class:`tape.Tape`, which follows a CUDA graph's rules.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gatdist.common.errors import ConfigError
from gatdist.config import load_config
from gatdist.game import require_whole_batches
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.graphs import StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, refused, spawn
from tape import Tape

CPU = torch.device("cpu")
SHAPE, BATCH, STEPS = (1, 6, 6), 10, 10
BASE = [
    f"run.global_batch={BATCH}",
    "precision.dtype=float64",
    "precision.cuda_graphs=true",
    "model.latent_size=6",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    # Numbers that are exact in single precision; an ε that keeps rounding from deciding signs.
    *(
        f"optim.{player}.{setting}"
        for player in ("generator", "discriminator")
        for setting in (f"learning_rate={2.0**-9}", "eps=1e-3")
    ),
]
SETTINGS = [
    ["game.update_rule=alternating"],
    ["game.update_rule=one_stage"],
    ["game.update_rule=consensus", "game.rule_options={strength=0.1}", "game.penalties={}"],
    [
        "optim.generator.micro_batch=2",
        "game.generator_batch=7",
        "optim.discriminator.clip_norm=0.5",
    ],
    ['game.augmentation={name="ada", initial_p=0.5, adjust_samples=500}'],
]
CANONICAL = ["run.global_batch=16", "run.reduction=canonical", "precision.dtype=float32"]


def train(comm, settings, records):
    """Return the state after some steps, by name; the number of replays; the parts of a tape."""
    config = load_config("digits", BASE + settings)
    tape = Tape() if records else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "is_readable", lambda tensor: False)
        state = TrainState(config, comm, SHAPE, 0, recorder=tape)
        rule = state.rule(config)
        play = StepGraphs(tape) if tape else None
        n = config.step_samples
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            dtype = DTYPES[config.precision.dtype]
            real = torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
            mine = own_samples(config, comm)
            positions = torch.arange(n) + n * step
            batch = Batch(real[mine], None, positions[mine], step, len(real))
            train_step(state, rule, batch, config, Statistics(CPU), PhaseTimer(CPU), play)
    learned = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return learned, tape.replayed if tape else 0


def train_all(comm, cases):
    """Train several cases in one process group."""
    return [train(comm, settings, records=True) for settings in cases]


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_recorded_workers_equal_one_worker(world_size):
    expected = [train(LocalCommunicator(CPU), settings, records=False) for settings in SETTINGS]
    for found in spawn(world_size, train_all, SETTINGS):
        for (here, replayed), (there, _) in zip(found, expected, strict=True):
            assert replayed > 0
            assert here.keys() == there.keys()
            for name, tensor in there.items():
                torch.testing.assert_close(here[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_canonical_recordings_are_equal_bit_for_bit(world_size):
    there, _ = train(LocalCommunicator(CPU), CANONICAL, records=False)
    for ((here, replayed),) in spawn(world_size, train_all, [CANONICAL]):
        assert replayed > 0
        for name, tensor in there.items():
            torch.testing.assert_close(here[name], tensor, rtol=0, atol=0, msg=name)


def test_gradients_can_be_sent_in_half_precision():
    (there, _), *_ = spawn(2, train_all, [SETTINGS[0]])[0]
    (here, _), *_ = spawn(2, train_all, [[*SETTINGS[0], "precision.reduce_dtype=bfloat16"]])[0]
    differences = [(here[n] - there[n]).abs().max() for n in there if n.startswith("generator/")]
    assert 0 < max(differences) < 0.05


def test_layers_that_communicate_are_rejected():
    """Batch normalization communicates by itself, which can't be recorded."""
    with FakeTensorMode():  # tensors that claim to be on CUDA, where there is none
        network = nn.Sequential(nn.BatchNorm2d(4, device="cuda"))
    plain = load_config("digits", ["run.global_batch=16"])
    require_whole_batches(plain, "generator", network, 2)
    recorded = load_config("digits", ["run.global_batch=16", "precision.cuda_graphs=true"])
    require_whole_batches(recorded, "generator", network, 1)
    with refused(ConfigError, "model.generator.name"):
        require_whole_batches(recorded, "generator", network, 2)
