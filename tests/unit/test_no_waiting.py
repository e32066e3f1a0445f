"""No step synchronizes with the device: it runs on a device without values.

Tensors on torch's ``meta`` device have shapes but no values; whatever needs a value (``.item()``,
``if tensor:``, a copy to the host) raises. A copy from host memory synchronizes, too.
"""

from contextlib import nullcontext

import pytest
import torch

from gatdist.config import load_config
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from tape import no_host_values

META = torch.device("meta")
SETTINGS = [
    *(
        [f"game.update_rule={rule}"]
        for rule in (
            "alternating",
            "simultaneous",
            "one_stage",
            "extragradient",
            "optimistic",
            "consensus",
        )
    ),
    ["health.spike=skip", "health.atomic=true"],
    ['game.augmentation={name="ada"}'],
    ['game.augmentation={name="diffaugment"}'],
    ['model.spectral_norm=["discriminator"]', "precision.channels_last=true"],
    ["game.penalties={lecam={strength=1.0}, path_length={strength=1.0}, wgan_gp={strength=1.0}}"],
    ["game.lazy_penalties=separate"],
    ["run.reduction=canonical"],
    ["optim.generator.micro_batch=16", "optim.generator.clip_norm=1.0"],
]


def step_on_meta(settings):
    config = load_config("digits", settings)
    state = TrainState(config, LocalCommunicator(META), (1, 8, 8), 10)
    rule = state.rule(config)
    n = config.step_samples
    for step in range(2):
        real = torch.zeros(n, 1, 8, 8, device=META)
        batch = Batch(real, None, torch.zeros(n, dtype=torch.int64, device=META), step, n)
        # Constants, which are created once, are created in the first step.
        with no_host_values() if step else nullcontext():
            train_step(state, rule, batch, config, Statistics(META), PhaseTimer(META))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings[0])
def test_no_host_synchronization_in_a_step(settings):
    step_on_meta(settings)


def test_synchronization_would_be_detected():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros((), device=META) > 0)


def test_copies_from_the_host_would_be_detected():
    with no_host_values(), pytest.raises(RuntimeError):
        torch.tensor([1.0, 2.0], device=META)
