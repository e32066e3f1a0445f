"""Games with inputs, maps of logits and terms do not depend on the number of workers."""

import pytest
import torch

from gatdist.config import load_config
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import spawn

BATCH, STEPS = 12, 3
SMALL = [
    "run.total_samples=600",
    f"run.global_batch={BATCH}",
    "precision.dtype=float64",
    "optim.generator.eps=1e-3",
    "optim.discriminator.eps=1e-3",
    "evaluate.metrics=[]",
    "game.penalties={}",
]
SIDE, LENGTH = 32, 2000
REUSED = ["game.latents=shared", "game.reuse_fakes=true"]
SMALL_BATCHES = ["optim.generator.micro_batch=1", "optim.discriminator.micro_batch=2"]
TRANSLATION = [
    'game.task={name="translation"}',
    "game.loss=least_squares",
    'model.generator={name="unet", width=4, norm="instance"}',
    'model.discriminator={name="patchgan", width=4, layers=1, norm="instance"}',
    "game.terms={l1={weight=100.0}, features={weight=10.0}}",
]
VOCODER = [
    'game.task={name="vocoder", crop=512, hop=16, window=64, bands=12, highest=3000.0}',
    "game.loss=least_squares",
    'model.generator={name="hifigan", version="v3", upsampling=[4, 4], width=8}',
    'model.discriminator={name="hifigan", periods=[2, 3], scales=2, period_width=2, '
    "scale_width=16}",
    "game.terms={log_mel={weight=45.0, hop=16, window=64, bands=12}, "
    "features={weight=2.0, logits=true}}",
]
CASES = {
    "alternating": TRANSLATION,
    "reused": [*TRANSLATION, *REUSED],
    "simultaneous": [*TRANSLATION, "game.update_rule=simultaneous"],
    "extragradient": [*TRANSLATION, "game.update_rule=extragradient"],
    "consensus": [
        *TRANSLATION,
        "game.update_rule=consensus",
        "game.rule_options={strength=0.1}",
    ],
    "micro_batches": [*TRANSLATION, *SMALL_BATCHES],
    "r1": [*TRANSLATION, "game.penalties={r1={strength=1.0, every_steps=2}}"],
    "vocoder": [*VOCODER, *REUSED],
    "vocoder, simultaneous": [*VOCODER, "game.update_rule=simultaneous"],
    "vocoder, micro_batches": [*VOCODER, *SMALL_BATCHES],
}


def batch_of(config, step):
    """Return a global batch, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    dtype = DTYPES[config.precision.dtype]
    positions = torch.arange(BATCH) + BATCH * step

    def normal(*shape):
        return torch.randn(BATCH, *shape, generator=generator, dtype=dtype)

    if config.game.task.name == "vocoder":
        return Batch(normal(1, LENGTH) / 4, None, positions, step)
    inputs = {"input": normal(1, SIDE, SIDE)}
    return Batch(normal(2, SIDE, SIDE), None, positions, step, inputs=inputs)


def train_steps(comm, overrides):
    config = load_config("digits", [*SMALL, *overrides])
    if config.game.task.name == "vocoder":
        shape, metadata = (1, LENGTH), {"modality": "audio", "sample_rate": 8000}
    else:
        shape = (2, SIDE, SIDE)
        metadata = {"modality": "image", "fields": {"input": (1, SIDE, SIDE)}}
    state = TrainState(config, comm, shape, 0, metadata)
    rule = state.rule(config)
    statistics = Statistics(comm.device)
    for step in range(STEPS):
        batch = batch_of(config, step).every(comm.world_size, comm.rank)
        train_step(state, rule, batch, config, statistics, PhaseTimer(comm.device))
    return {name: t.clone() for name, t in state.tensors().items()}


def train_all(comm, cases):
    return [train_steps(comm, overrides) for overrides in cases]


@pytest.fixture(scope="module")
def alone():
    return dict(
        zip(CASES, train_all(LocalCommunicator(torch.device("cpu")), CASES.values()), strict=True)
    )


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_gives_what_one_gives(workers, alone):
    for rank in spawn(workers, train_all, list(CASES.values())):
        for (name, expected), found in zip(alone.items(), rank, strict=True):
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(
                    found[key],
                    tensor,
                    rtol=1e-11,
                    atol=1e-9,
                    msg=lambda m, k=key, n=name: f"{n} {k}: {m}",
                )


def test_terms_and_inputs_change_the_result(alone):
    config = [*TRANSLATION, "game.terms={l1={weight=100.0}}"]
    without = train_steps(LocalCommunicator(torch.device("cpu")), config)
    assert not torch.equal(
        without["generator/downs.0.0.weight"], alone["alternating"]["generator/downs.0.0.weight"]
    )
