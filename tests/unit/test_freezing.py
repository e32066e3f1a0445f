"""Parameters that are not trained: ``optim.*.freeze``."""

import pytest
import torch

from gatdist.common.errors import ConfigError
from gatdist.config import load_config
from gatdist.models import build_networks
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.state import TrainState
from support import refused

SMALL = [
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "evaluate.metrics=[]",
    "game.loss=nonsaturating",
    "run.total_samples=256",
    "monitor.tensorboard=false",
]


def test_frozen_parameters_keep_their_values_and_others_do_not(tmp_path):
    import gatdist
    from gatdist.runs import Checkpoints
    from gatdist.storage import Store

    config = load_config(
        "digits", [*SMALL, 'optim.discriminator.freeze=["levels.0.*", "start.bias"]']
    )
    before = {k: t.clone() for k, t in build_networks(config, (1, 8, 8), 0)[1].state_dict().items()}
    gatdist.train(config, str(tmp_path / "run"), local=True)
    checkpoint = Checkpoints(Store(str(tmp_path / "run" / "checkpoints"))).newest()
    after = {
        name.removeprefix("discriminator/"): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("discriminator/")
    }
    frozen = {name for name in before if name.startswith("levels.0.") or name == "start.bias"}
    assert frozen
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in frozen), name
    assert not any("/levels.0." in name for name in checkpoint.tensors if "optimizer_disc" in name)


def test_frozen_weights_may_be_spectrally_normalized():
    norm = 'model.spectral_norm=["discriminator"]'
    config = load_config(
        "digits", [*SMALL, norm, 'optim.discriminator.freeze=["levels.0.*.weight"]']
    )
    state = TrainState(config, LocalCommunicator(torch.device("cpu")), (1, 8, 8), 0)
    names = state.players["discriminator"].parameters
    assert any(name.startswith("levels.0.") and name.endswith("bias") for name in names)
    assert not any(name.startswith("levels.0.") and "weight" in name for name in names)


@pytest.mark.parametrize("patterns", ['["block.*"]', '["*"]'])
def test_patterns_that_match_nothing_or_everything_are_rejected(patterns):
    config = load_config("digits", [*SMALL, f"optim.generator.freeze={patterns}"])
    with refused(ConfigError, "optim.generator.freeze"):
        build_networks(config, (1, 8, 8), 0)
