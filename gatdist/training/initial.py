"""Networks to start from: those of another run, in place of random ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gatdist.config import Config, PlayerName
from gatdist.errors import CheckpointError, ConfigError

# Of another run's tensors, those that each network starts from.
_PARTS: Mapping[PlayerName, str] = {"generator": "average", "discriminator": "discriminator"}


@torch.no_grad()
def start_from_another_run(config: Config, networks: Mapping[PlayerName, nn.Module]) -> None:
    """Give both networks the weights of the run that ``model.init_from`` names, if it does.

    The generator starts from that run's average.

    Raises:
        ConfigError: there is no run, or no whole checkpoint.
        CheckpointError: its networks are others; the first tensor that differs is named.
    """
    url = config.model.init_from
    if not url:
        return
    from gatdist.runs import Checkpoints  # a bare machine that measures steps has no fsspec
    from gatdist.storage import Store, absolute

    store = Store(absolute(url), config.run.storage_options)
    checkpoint = Checkpoints(store.child("checkpoints")).newest()
    if checkpoint is None:
        raise ConfigError(
            "model.init_from",
            "is no run with a whole checkpoint",
            value=url,
            mend="Name the folder of a run that has reached run.checkpoint_samples",
        )
    for player, network in networks.items():
        _require_fit(url, network, checkpoint.tensors, _PARTS[player])
        for name, tensor in network.state_dict().items():
            tensor.copy_(checkpoint.tensors[f"{_PARTS[player]}/{name}"])


def _require_fit(url: str, network: nn.Module, theirs: Mapping[str, Tensor], part: str) -> None:
    for name, tensor in network.state_dict().items():
        their = theirs.get(f"{part}/{name}")
        if their is not None and their.shape == tensor.shape:
            continue
        there = "is missing there" if their is None else f"has shape {tuple(their.shape)} there"
        raise CheckpointError(
            f"{url}: tensor {part}/{name}",
            f"{there}, {tuple(tensor.shape)} in this run's network",
            mend="Make the section model that of the other run",
        )
