"""Small games of translation and of a vocoder, on random batches."""

import torch

from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.training.graphs import StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples

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


def batch_of(config, step):
    """Return a global batch, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    dtype = DTYPES[config.precision.dtype]
    positions = torch.arange(BATCH) + BATCH * step

    def normal(*shape):
        return torch.randn(BATCH, *shape, generator=generator, dtype=dtype)

    if config.game.task.name == "vocoder":
        return Batch(normal(1, LENGTH) / 4, None, positions, step, BATCH)
    inputs = {"input": normal(1, SIDE, SIDE)}
    return Batch(normal(2, SIDE, SIDE), None, positions, step, BATCH, inputs=inputs)


def state_of(comm, config, recorder=None):
    if config.game.task.name == "vocoder":
        shape, metadata = (1, LENGTH), {"modality": "audio", "sample_rate": 8000}
    else:
        shape = (2, SIDE, SIDE)
        metadata = {"modality": "image", "fields": {"input": (1, SIDE, SIDE)}}
    return TrainState(config, comm, shape, 0, metadata, recorder)


def train(comm, config, steps=STEPS, recorder=None):
    state = state_of(comm, config, recorder)
    play = StepGraphs(recorder) if recorder else None
    rule = state.rule(config)
    statistics = Statistics(comm.device)
    for step in range(steps):
        batch = batch_of(config, step)._at(own_samples(config, comm))
        train_step(state, rule, batch, config, statistics, PhaseTimer(comm.device), play)
    return {name: t.clone() for name, t in state.tensors().items()}
