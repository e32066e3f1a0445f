"""The step on a CUDA device: correct in every precision, without host synchronization."""

import pytest
import torch

from gatdist.config import load_config
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.recording import cuda_recorder
from gatdist.training.graphs import WARM_UP_STEPS, StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE, BATCH = (3, 16, 16), 16
BASE = [
    f"run.global_batch={BATCH}",
    "model.latent_size=16",
    'model.generator={name="residual", width=16}',
    'model.discriminator={name="residual", width=16}',
    "game.penalties={r1={strength=1.0, every_steps=2}}",
    "game.loss=nonsaturating",
    "optim.generator.eps=1e-4",
    "optim.discriminator.eps=1e-4",
]
RULES = ["alternating", "simultaneous", "one_stage", "extragradient", "optimistic", "consensus"]


def train(device, overrides, steps=4, strict=False, records=False):
    """Return the players' weights after a few steps on synthetic images."""
    device = torch.device(device)
    config = load_config("digits", BASE + overrides)
    recorder = cuda_recorder(device) if records else None
    state = TrainState(config, LocalCommunicator(device), SHAPE, 0, recorder=recorder)
    rule = state.rule(config)
    play = StepGraphs(recorder) if recorder else None
    statistics, timer = Statistics(device), PhaseTimer(device)
    for step in range(steps):
        real = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(step))
        real = real.to(device, DTYPES[config.precision.dtype])
        if config.precision.channels_last:
            real = real.contiguous(memory_format=torch.channels_last)
        positions = (torch.arange(BATCH) + BATCH * step).to(device)
        if strict and step == (2 * WARM_UP_STEPS + 2 if records else 2):  # after initialization
            torch.cuda.set_sync_debug_mode("error")
        try:
            batch = Batch(real, None, positions, step)
            train_step(state, rule, batch, config, statistics, timer, play)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return torch.cat(
        [
            p.detach().double().flatten().cpu()
            for player in state.players.values()
            for p in player.bare.parameters()
        ]
    )


@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_cpu_in_float64(rule):
    overrides = [f"game.update_rule={rule}", "precision.dtype=float64"]
    torch.testing.assert_close(train("cuda", overrides), train("cpu", overrides), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", ["false", "true"])
def test_every_precision_and_layout_follows_float64(rule, dtype, channels_last):
    reference = train("cuda", [f"game.update_rule={rule}", "precision.dtype=float64"])
    start = train("cuda", ["precision.dtype=float64"], steps=0)
    found = train(
        "cuda",
        [
            f"game.update_rule={rule}",
            f"precision.dtype={dtype}",
            f"precision.channels_last={channels_last}",
        ],
    )
    tolerance = {"float32": 0.02, "bfloat16": 0.3, "float16": 0.1}[dtype]
    assert ((found - reference).norm() / (reference - start).norm()).item() < tolerance


@pytest.mark.parametrize("rule", RULES)
def test_no_host_synchronization_in_a_step(rule):
    train("cuda", [f"game.update_rule={rule}"], strict=True)


@pytest.mark.filterwarnings("ignore")  # caused by torch.compile
@pytest.mark.parametrize("rule", ["alternating", "one_stage"])
def test_compiled_networks_compute_the_same(rule):
    overrides = [f"game.update_rule={rule}", "game.penalties={}"]
    compiled = [*overrides, 'precision.compile=["generator", "discriminator"]']
    torch.testing.assert_close(
        train("cuda", compiled, steps=2), train("cuda", overrides, steps=2), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("rule", RULES)
def test_replayed_steps_equal_eager_steps(rule):
    """Steps with and without the penalty are recorded separately, each after its warm-up."""
    overrides = [f"game.update_rule={rule}", "precision.dtype=float64"]
    torch.testing.assert_close(
        train("cuda", overrides, steps=16, records=True, strict=True),
        train("cuda", overrides, steps=16),
        rtol=0,
        atol=1e-6,  # learning rates are passed in single precision
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_can_be_recorded(dtype):
    overrides = [f"precision.dtype={dtype}", "precision.channels_last=true"]
    reference = train("cuda", ["precision.dtype=float64"], steps=12)
    start = train("cuda", ["precision.dtype=float64"], steps=0)
    found = train("cuda", overrides, steps=12, records=True)
    tolerance = {"float32": 0.05, "bfloat16": 0.4, "float16": 0.2}[dtype]
    assert ((found - reference).norm() / (reference - start).norm()).item() < tolerance
