"""All that a run has learned, and its one clock."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError
from gatdist.config import BOTH, Config, PlayerName
from gatdist.game import Game, UpdateRule, build_update_rule, require_whole_batches, update_rules
from gatdist.game.contract import examine
from gatdist.game.exactness import require_exact
from gatdist.game.penalties import penalties
from gatdist.models import build_networks
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.recording import OutsideCommunicator, Recorder
from gatdist.parallel.reduction import Reduction
from gatdist.training.averaging import MovingAverage
from gatdist.training.guard import Guard, LossScaler
from gatdist.training.initial import start_from_another_run
from gatdist.training.player import Player


class TrainState:
    """Players, the game between them, the averaged generator, the clock, and what guards them.

    Args:
        config: of the run; its seed initializes the networks, alike on every worker.
        comm: the workers.
        sample_shape: of one sample, as networks see it.
        num_classes: of the data; 0 if unlabelled.
        metadata: what else networks may want to know of the samples.
        recorder: of steps, if they are recorded: communication then stays outside.

    Attributes:
        samples_seen: real samples shown so far, globally; the only counter there is.
        rollbacks: how often the run went back; numbers the noise stream.
        warnings: what a person should know of the networks.
        scaler: of float16's losses; None in other precisions.

    Raises:
        ConfigError: networks, game and rule do not go together.
        PluginError: a user's network breaks the contract (:mod:`gatdist.game.contract`).
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        sample_shape: tuple[int, ...],
        num_classes: int,
        metadata: Mapping[str, Any] = MappingProxyType({}),
        recorder: Recorder | None = None,
    ) -> None:
        self.samples_seen = 0
        self.rollbacks = 0
        between = OutsideCommunicator(comm, recorder) if recorder else comm
        self.reduction = Reduction.from_config(config, between)
        built = build_networks(config, sample_shape, num_classes, metadata)
        networks = dict(zip(BOTH, built, strict=True))
        for network in networks.values():
            network.to(comm.device)
        traits = examine(config, networks, sample_shape, num_classes, metadata)
        self.warnings = require_exact(config, traits)
        for name, network in networks.items():
            require_whole_batches(config, name, network, comm.world_size)
            if comm.world_size > 1:
                networks[name] = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.average = MovingAverage(networks["generator"], config.game.ema_half_life_samples)
        for name in config.precision.compile:
            networks[name].compile()
        self.players: dict[PlayerName, Player] = {
            name: Player(
                network,
                getattr(config.optim, name),
                self.reduction,
                direction=update_rules[config.game.update_rule].direction,
                lazy_steps=_lazy_steps(config, name),
                may_skip=traits[name].may_skip_parameters,
            )
            for name, network in networks.items()
        }
        self.game = Game.from_config(
            config,
            self.players["generator"].network,
            self.players["discriminator"].network,
            sample_shape,
            traits,
        )
        self._rule: UpdateRule | None = None
        self.guard = Guard(config.health, BOTH, comm.device)
        self.scaler = LossScaler(comm.device) if config.precision.dtype == "float16" else None

    def rule(self, config: Config) -> UpdateRule:
        """The update rule between this state's players, whose own state is part of this one."""
        self._rule = build_update_rule(config, self.game)
        return self._rule

    def start_from_another_run(self, config: Config, run_dir: str) -> None:
        """Take over the networks that ``model.init_from`` names, if it does. See ``initial``."""
        if config.model.init_from:
            networks = {name: player.bare for name, player in self.players.items()}
            start_from_another_run(config, networks, run_dir)
            self.average.start(self.players["generator"].bare)

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor by name; the part before the first ``/`` names its file."""
        tensors = {
            name: t for player, owner in self.players.items() for name, t in owner.tensors(player)
        }
        tensors |= {f"average/{name}": t for name, t in self.average.network.state_dict().items()}
        tensors |= {f"guard/{name}": t for name, t in self.guard.tensors.items()}
        if self.scaler:
            tensors |= {f"scaler/{name}": t for name, t in self.scaler.tensors.items()}
        adaptive_states = self._rule.adaptive_states if self._rule else self.game.adaptive_states
        for kind, adaptive_state in adaptive_states.items():
            tensors |= {f"game/{kind}/{name}": t for name, t in adaptive_state.tensors.items()}
        return tensors

    @torch.no_grad()
    def load(self, samples_seen: int, tensors: dict[str, Tensor], subject: str = "") -> None:
        """Take over a checkpoint; ``subject`` names it in messages.

        Raises:
            CheckpointError: its tensors do not fit these networks, or hold what training never
                gives; the first is named.
        """
        mine = self.tensors()
        _require_fit(mine, tensors, f"{subject}: " if subject else "")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.samples_seen = samples_seen
        if self._rule:
            self._rule.loaded()


def _lazy_steps(config: Config, player: PlayerName) -> int:
    """The smallest interval of the player's penalties that have optimizer steps of their own."""
    intervals = [
        requested.every_steps
        for name, requested in config.game.penalties.items()
        if requested.every_steps > 1 and penalties[name].player == player
    ]
    return min(intervals, default=0) if config.game.lazy_penalties == "separate" else 0


def _require_fit(mine: dict[str, Tensor], theirs: dict[str, Tensor], subject: str) -> None:
    for name in sorted(mine):

        def refuse(rule: str, name: str = name) -> NoReturn:
            hint = "Use the networks it was made with, or choose another --run-dir"
            raise CheckpointError(f"{subject}tensor {name}", rule, hint=hint)

        if name not in theirs:
            refuse("is missing in the checkpoint: it is of other networks")
        here, there = mine[name], theirs[name]
        if here.shape != there.shape:
            shapes = tuple(there.shape), tuple(here.shape)
            refuse(f"has shape {shapes[0]} in the checkpoint, {shapes[1]} in the network")
        if here.dtype != there.dtype:
            refuse(f"is {there.dtype} in the checkpoint, {here.dtype} in the network")
        # Masks of a user's network may be infinite, and are so from the beginning.
        if here.isfinite().all() and not there.isfinite().all():
            refuse("is not finite in the checkpoint")
