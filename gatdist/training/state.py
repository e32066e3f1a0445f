"""All that a run has learned, and its one clock."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.config import Config
from gatdist.errors import CheckpointError
from gatdist.game import Game
from gatdist.game.updates.rule import PlayerName
from gatdist.models import build_networks
from gatdist.parallel.communicator import Communicator
from gatdist.training.averaging import MovingAverage
from gatdist.training.player import Player


class TrainState:
    """Players, the averaged generator, the clock, and the count of skipped steps.

    Args:
        config: of the run; its seed initializes the networks, alike on every worker.
        comm: the workers.
        sample_shape: of one sample, (C, H, W) or (n,).
        num_classes: of the data; 0 if unlabelled.

    Attributes:
        samples_seen: real samples shown so far, globally; the only counter there is.
        skipped: steps skipped for non-finite gradients, a scalar int64 on the device.
    """

    def __init__(
        self, config: Config, comm: Communicator, sample_shape: tuple[int, ...], num_classes: int
    ) -> None:
        self.samples_seen = 0
        generator, discriminator = build_networks(config, sample_shape, num_classes)
        self.average = MovingAverage(
            generator.to(comm.device), config.game.averaging_half_life_samples
        )
        self.players: dict[PlayerName, Player] = {
            "generator": Player(generator, config.optim.generator, comm),
            "discriminator": Player(
                discriminator.to(comm.device), config.optim.discriminator, comm
            ),
        }
        self.skipped = torch.zeros((), dtype=torch.int64, device=comm.device)

    def game(self, config: Config) -> Game:
        """The game between this state's players."""
        return Game.from_config(
            config, self.players["generator"].network, self.players["discriminator"].network
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name; the part before the first ``/`` names its file."""
        tensors = {
            name: t for player, owner in self.players.items() for name, t in owner.tensors(player)
        }
        tensors |= {f"average/{name}": t for name, t in self.average.network.state_dict().items()}
        return tensors | {"counters/skipped": self.skipped}

    def load(self, samples_seen: int, tensors: dict[str, Tensor]) -> None:
        """Take over a checkpoint.

        Raises:
            CheckpointError: its tensors do not fit these networks; the first that differs is named.
        """
        _require_fit(self.tensors(), tensors)
        for name, player in self.players.items():
            player.load(name, tensors)
        average = {
            k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")
        }
        self.average.network.load_state_dict(average)
        self.skipped.copy_(tensors["counters/skipped"])
        self.samples_seen = samples_seen


def _require_fit(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in sorted(
        mine
    ):  # optimizer state is absent before the first step, so only one direction is checked
        if name not in theirs:
            raise CheckpointError(
                f"tensor {name}", "is missing in the checkpoint: it is of other networks"
            )
        if mine[name].shape != theirs[name].shape:
            there, here = tuple(theirs[name].shape), tuple(mine[name].shape)
            raise CheckpointError(
                f"tensor {name}", f"has shape {there} in the checkpoint, {here} in the network"
            )
