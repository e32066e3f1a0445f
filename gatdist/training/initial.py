"""Networks to start from: those of another run, in place of random ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.config import Config, PlayerName, redact_url


@torch.no_grad()
def start_from_another_run(
    config: Config, networks: Mapping[PlayerName, nn.Module], run_dir: str
) -> None:
    """Give both networks the weights of the run that ``model.init_from`` names, if it does.

    The generator starts from that run's average.

    Args:
        config: of this run.
        networks: of both players.
        run_dir: URL of this run's folder, or its origin: that run's credentials are for it alone.

    Raises:
        ConfigError: there is no run, or no whole checkpoint.
        CheckpointError: its networks are others; the first tensor that differs is named.
    """
    url = config.model.init_from
    if not url:
        return
    from gatdist.runs import PARTS, Checkpoints  # a bare machine that measures steps has no fsspec
    from gatdist.storage import Store, absolute, options_for

    url = absolute(url)
    options = options_for(url, run_dir, config.run.storage_options)
    store = Store(url, options | config.model.init_from_storage_options)
    checkpoint = Checkpoints(store.child("checkpoints")).newest()
    if checkpoint is None:
        raise ConfigError(
            "model.init_from",
            "is no run with a whole checkpoint",
            value=redact_url(url),
            hint="Name the folder of a run that has reached run.checkpoint_every_samples",
        )
    for player, network in networks.items():
        weights = checkpoint.weights(player)
        _require_fit(f"{redact_url(url)}: tensor {PARTS[player]}", network, weights)
        for name, tensor in network.state_dict().items():
            tensor.copy_(weights[name])


def _require_fit(subject: str, network: nn.Module, theirs: Mapping[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        their = theirs.get(name)
        if their is not None and their.shape == tensor.shape:
            continue
        there = "is missing there" if their is None else f"has shape {tuple(their.shape)} there"
        raise CheckpointError(
            f"{subject}/{name}",
            f"{there}, {tuple(tensor.shape)} in this run's network",
            hint="Make the section model that of the other run",
        )
