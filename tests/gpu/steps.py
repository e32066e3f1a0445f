"""A few steps of a small game, and how far precisions may be from float64."""

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
from gatdist.training.step import as_configured, train_step

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


def batch_of(step, config, device):
    real = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(step))
    real = real.to(device, DTYPES[config.precision.dtype])
    if config.precision.channels_last:
        real = real.contiguous(memory_format=torch.channels_last)
    return Batch(real, None, (torch.arange(BATCH) + BATCH * step).to(device), step, BATCH)


def train(device, overrides, steps=4, strict=False, records=False):
    """Return the players' weights after a few steps on synthetic images."""
    device = torch.device(device)
    config = load_config("digits", BASE + overrides)
    recorder = cuda_recorder(device) if records else None
    state = TrainState(config, LocalCommunicator(device), SHAPE, 0, recorder=recorder)
    rule = state.rule(config)
    play = StepGraphs(recorder) if recorder else None
    statistics, timer = Statistics(device), PhaseTimer(device)
    with as_configured(config):
        for step in range(steps):
            batch = batch_of(step, config, device)
            if strict and step == (2 * WARM_UP_STEPS + 2 if records else 2):  # after initialization
                torch.cuda.set_sync_debug_mode("error")
            try:
                train_step(state, rule, batch, config, statistics, timer, play)
            finally:
                if strict:
                    torch.cuda.set_sync_debug_mode("default")
    return torch.cat(
        [
            p.detach().double().flatten().cpu()
            for player in state.players.values()
            for p in player.bare.parameters()
        ]
    )


# Of the change of the weights in 4 steps. ``float32`` is without TF32.
TOLERANCES = {"float32": 0.02, "tf32": 0.1, "bfloat16": 0.3, "float16": 0.1}


def error(device, overrides, rule="alternating"):
    """Return the distance to the weights in float64, relative to their change."""
    overrides = [f"game.update_rule={rule}", *overrides]
    reference = train(device, [f"game.update_rule={rule}", "precision.dtype=float64"])
    start = train(device, ["precision.dtype=float64"], steps=0)
    found = train(device, overrides)
    return ((found - reference).norm() / (reference - start).norm()).item()
