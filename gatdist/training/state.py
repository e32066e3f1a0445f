"""The state of a run: networks, optimizers, the averaged generator, and ``samples_seen``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.common.heartbeat import beat
from gatdist.config import BOTH, Config, PlayerName, redact_url
from gatdist.game import (
    Game,
    Phase,
    UpdateRule,
    build_update_rule,
    require_whole_batches,
    require_whole_groups,
    update_rules,
)
from gatdist.game.build import Shapes, build_networks_of, build_task
from gatdist.game.contract import examine
from gatdist.game.exactness import require_exact
from gatdist.game.hidden import Traits
from gatdist.game.penalties import penalties
from gatdist.game.tasks import Task
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.parallel.recording import OutsideCommunicator, Recorder
from gatdist.parallel.reduction import Reduction
from gatdist.training.health import Guard, LossScaler
from gatdist.training.player import MovingAverage, Player


class TrainState:
    """All that training changes and checkpoints hold.

    Args:
        config: of the run; its seed initializes the networks identically on every worker.
        comm: the workers.
        sample_shape: of one sample in network representation.
        num_classes: of the data; 0 if unlabelled.
        metadata: of the samples, passed to the networks.
        recorder: records steps as CUDA graphs; communication then stays outside of them.
        networks: generator and discriminator on the device; by default they are built.
        traits: of ``networks``; by default they are examined.
        task: of the run; by default it is built.

    Attributes:
        samples_seen: real samples shown so far over all workers, the only counter of progress.
        rollbacks: number of rollbacks, which selects the noise stream.
        warnings: about the networks, for the user.
        scaler: loss scaler under float16, else None.
        before_optimizers: called in each phase, after all of its communication.

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
        networks: tuple[nn.Module, nn.Module] | None = None,
        traits: Mapping[PlayerName, Traits] | None = None,
        task: Task | None = None,
    ) -> None:
        self.samples_seen = 0
        self.rollbacks = 0
        self.before_optimizers: Callable[[Phase], None] = lambda phase: None
        between = OutsideCommunicator(comm, recorder) if recorder else comm
        self.reduction = Reduction.from_config(config, between)
        task = task or build_task(config, sample_shape, metadata)
        shapes = Shapes.of(task, sample_shape, metadata)
        if networks is None:
            networks = build_networks_of(config, task, sample_shape, num_classes, metadata)
            for network in networks:
                network.to(comm.device)
        by_player = dict(zip(BOTH, networks, strict=True))
        if traits is None:
            traits = examine(config, by_player, task, sample_shape, num_classes, metadata)
        self.warnings = require_exact(config, traits)
        # Workers that may change have equal networks on any number of them.
        several = max(comm.world_size, 2 if isinstance(comm, Members) else 1)
        for name, network in by_player.items():
            require_whole_batches(config, name, network, several)
            require_whole_groups(config, name, network, [comm.world_size])
            if several > 1:
                by_player[name] = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.average = MovingAverage(by_player["generator"], config.game.ema_batch_norm)
        for name in config.precision.compile:
            by_player[name].compile()
        self.players: dict[PlayerName, Player] = {
            name: Player(
                network,
                getattr(config.optim, name),
                self.reduction,
                direction=update_rules[config.game.update_rule].direction,
                lazy_steps=_lazy_steps(config, name),
                may_skip=traits[name].may_skip_parameters,
            )
            for name, network in by_player.items()
        }
        self.game = Game.from_config(
            config,
            self.players["generator"].network,
            self.players["discriminator"].network,
            shapes.shown,
            traits,
            task,
            metadata,
        )
        self._rule: UpdateRule | None = None
        self.guard = Guard(config.health, BOTH, comm.device)
        self.scaler = LossScaler(comm.device) if config.precision.dtype == "float16" else None

    def rule(self, config: Config) -> UpdateRule:
        """Build the update rule, whose own state becomes part of this one."""
        self._rule = build_update_rule(config, self.game)
        return self._rule

    def start_from_another_run(self, config: Config, run_dir: str) -> None:
        """Copy the networks that ``model.init_from`` names. See :func:`start_from_another_run`."""
        if config.model.init_from:
            networks, comm = {n: p.bare for n, p in self.players.items()}, self.reduction.comm
            comm.of_main(lambda: start_from_another_run(config, networks, run_dir))
            for network in networks.values():
                comm.broadcast_module_(network)
            self.average.start(self.players["generator"].bare)

    def tensors(self) -> dict[str, Tensor]:
        """Return every trained tensor by name; the part before the first ``/`` names its file."""
        tensors = {
            name: t for player, owner in self.players.items() for name, t in owner.tensors(player)
        }
        tensors |= {f"average/{name}": t for name, t in self.average.network.state_dict().items()}
        tensors |= {f"guard/{name}": t for name, t in self.guard.tensors.items()}
        if self.scaler:
            tensors |= {f"scaler/{name}": t for name, t in self.scaler.tensors.items()}
        adaptive = self._rule.adaptive_states if self._rule else self.game.adaptive_states
        for kind, state in adaptive.items():
            tensors |= {f"game/{kind}/{name}": t for name, t in state.tensors.items()}
        return tensors

    @torch.no_grad()
    def load(self, samples_seen: int, tensors: Mapping[str, Tensor], subject: str = "") -> None:
        """Restore a checkpoint on all workers, of which each passes the tensors that it has read.

        ``subject`` names it in messages.

        Raises:
            CheckpointError: its tensors do not fit these networks, or are not finite where training
                never leaves such values; the first is named.
        """
        mine, comm = self.tensors(), self.reduction.comm
        names, subject = sorted(mine), f"{subject}: tensor " if subject else "tensor "
        read = [[1, comm.rank] if name in tensors else [0, 0] for name in names]
        counts, sources = comm.all_reduce_(torch.tensor(read, device=comm.device)).T.tolist()

        def check() -> None:
            for name, count in zip(names, counts, strict=True):
                if count > 1:  # files are read by different workers
                    raise CheckpointError(f"{subject}{name}", "is in several files")
            hint = "Use the networks it was made with, or choose another --run-dir"
            # What no worker has read is missing for all.
            held = {n for n, count in zip(names, counts, strict=True) if n in tensors or not count}
            require_fit({name: mine[name] for name in held}, tensors, subject, hint)

        comm.of_each(check)
        for name, source in zip(names, sources, strict=True):
            if name in tensors:
                mine[name].copy_(tensors[name])
            comm.broadcast_(mine[name], source)
            beat()
        self.samples_seen = samples_seen
        self.loaded()

    @torch.no_grad()
    def share(self, sources: Sequence[int]) -> None:
        """Copy the state of the workers ``sources``, who hold the same one, to all workers.

        Each source sends its share of the tensors.
        """
        for number, tensor in enumerate(self.tensors().values()):
            self.reduction.comm.broadcast_(tensor, sources[number % len(sources)])
            beat()
        self.loaded()

    def loaded(self) -> None:
        """Take note that tensors were overwritten."""
        if self._rule:
            self._rule.loaded()


def _lazy_steps(config: Config, player: PlayerName) -> int:
    """Return the smallest interval of the player's penalties with optimizer steps of their own."""
    intervals = [
        penalty.every_steps
        for name, penalty in config.game.penalties.items()
        if penalty.every_steps > 1 and penalties[name].player == player
    ]
    return min(intervals, default=0) if config.game.lazy_penalties == "separate" else 0


def require_fit(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], subject: str, hint: str
) -> None:
    """Refuse a checkpoint whose tensors can't be copied to ``mine``.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or not finite.
    """
    for name in sorted(mine):

        def refuse(rule: str, name: str = name) -> NoReturn:
            raise CheckpointError(f"{subject}{name}", rule, hint=hint)

        if name not in theirs:
            refuse("is missing in the checkpoint, which is of other networks")
        here, there = mine[name], theirs[name]
        if here.shape != there.shape:
            shapes = tuple(there.shape), tuple(here.shape)
            refuse(f"has shape {shapes[0]} in the checkpoint, {shapes[1]} in the network")
        if here.dtype != there.dtype:
            refuse(f"is {there.dtype} in the checkpoint, {here.dtype} in the network")
        # Masks of a user's network may be infinite, and are so from the beginning.
        if here.isfinite().all() and not there.isfinite().all():
            refuse("is not finite in the checkpoint")


@torch.no_grad()
def start_from_another_run(
    config: Config, networks: Mapping[PlayerName, nn.Module], run_dir: str
) -> list[str]:
    """Copy the weights of the run that ``model.init_from`` names, if any, to both networks.

    The generator starts from that run's average.

    Args:
        config: of this run.
        networks: of both players.
        run_dir: URL of this run's folder, or its origin: that run's credentials are for it alone.

    Returns:
        Messages about tensors that were not copied.

    Raises:
        ConfigError: there is no run, or it has no complete checkpoint.
        CheckpointError: its networks are others; the first tensor that differs is named.
    """
    url = config.model.init_from
    if not url:
        return []
    from gatdist.runs import GROUPS, Checkpoints  # a machine that only benchmarks has no fsspec
    from gatdist.storage import Store
    from gatdist.storage.urls import absolute, options_for

    url = absolute(url)
    options = options_for(url, run_dir, config.run.storage_options)
    store = Store(url, options | config.model.init_from_storage_options)
    checkpoint = Checkpoints(store.child("checkpoints")).find(groups=[*GROUPS.values()])
    if checkpoint is None:
        raise ConfigError(
            "model.init_from",
            "is no run with a complete checkpoint",
            value=redact_url(url),
            hint="Name the folder of a run that has reached run.checkpoint_every_samples",
        )
    notes: list[str] = []
    for player, network in networks.items():
        mine = network.state_dict()
        weights = {  # another run may train in another dtype
            name: tensor.to(mine[name].dtype) if name in mine else tensor
            for name, tensor in checkpoint.weights(player).items()
        }
        subject = f"{redact_url(url)}: tensor {GROUPS[player]}/"
        hint = "Make the section model that of the other run, or set model.init_from_strict = false"
        if not config.model.init_from_strict:
            mine = _shared(mine, weights)
            if not mine:
                rule = f"has no tensor of the {player} with the same name and shape"
                raise CheckpointError(redact_url(url), rule, hint="Choose another run")
            if initialized := [name for name in network.state_dict() if name not in mine]:
                shown = ", ".join(initialized[:3]) + ", …" * (len(initialized) > 3)
                count = f"{len(mine)} of {len(mine) + len(initialized)} tensors"
                notes.append(
                    f"model.init_from: copied {count} of the {player}; initialized {shown}"
                )
        require_fit(mine, weights, subject, hint)
        for name, tensor in mine.items():
            tensor.copy_(weights[name])
    return notes


def _shared(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ``mine`` that ``theirs`` has with the same shape."""
    return {
        name: tensor
        for name, tensor in mine.items()
        if name in theirs and theirs[name].shape == tensor.shape
    }
