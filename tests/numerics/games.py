"""Small games with known behaviour, run by the real step, players and update rules."""

from __future__ import annotations

import torch
from torch import nn

from gatdist.config import BOTH, Schedule, parse_config
from gatdist.game import Game, Hyperparameters, Loss, Step, build_update_rule
from gatdist.game.losses import losses
from gatdist.game.penalties import ScheduledPenalty, penalties
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction, Reduction
from gatdist.training.health import Guard, LossScaler
from gatdist.training.player import MovingAverage, Player
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

CPU = torch.device("cpu")


class DiracGenerator(nn.Module):
    """Every fake is θ, for any latent."""

    def __init__(self, theta=1.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, latents, labels=None):
        return self.theta.expand(len(latents), 1)


class DiracDiscriminator(nn.Module):
    """D(x) = ψ x, from −1: the paper swaps real and fake compared with gatdist, and starts at 1."""

    def __init__(self, psi=-1.0):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([psi], dtype=torch.float64))

    def forward(self, samples, labels=None):
        return (samples * self.psi)[:, 0]


def bilinear_loss(alpha):
    """L_G = αθψ = −L_D, for networks of :class:`DiracGenerator` and a real sample at 0."""
    return Loss(
        discriminator=lambda real, fake: -alpha * fake,
        generator=lambda real, fake: alpha * fake,
        ratio=lambda real, fake: fake.new_full(fake.shape, -1.0),
        zero_sum=True,
    )


def dirac_game(loss, theta=1.0, psi=-1.0, **strengths):
    """Mescheder et al. 2018: the real distribution is a point at 0."""
    scheduled = tuple(
        ScheduledPenalty(name, penalties[name], Schedule.constant(strength))
        for name, strength in strengths.items()
    )
    loss = losses[loss] if isinstance(loss, str) else loss
    return Game(DiracGenerator(theta), DiracDiscriminator(psi), loss, 0, 1, scheduled)


def config_of(rule, *, rate=0.2, batch=1, optim=None, health=None, precision=None, **game):
    """Return a configuration with plain gradient descent, unless ``optim`` overrides it."""
    player = {"name": "sgd", "learning_rate": rate} | (optim or {})
    return parse_config(
        {
            "run": {"total_samples": 64, "global_batch": batch},
            "data": {"url": "builtin:ring"},
            "game": {"update_rule": rule} | game,
            "optim": {"generator": player, "discriminator": player},
            "health": health or {},
            "precision": precision or {},
        }
    )


def rule_of(game, name, **options):
    """Return the update rule ``name`` for ``game``."""
    return build_update_rule(config_of(name, **options), game)


def batch_of(real, step=0, labels=None):
    """Return a batch at the start of a run."""
    return Batch(real, labels, torch.arange(len(real)) + step * len(real), step, len(real))


def phases_of(rule, batch, rate=0.2):
    """Return the phases of one step."""
    return rule.phases(Step(batch, dict.fromkeys(BOTH, Hyperparameters(rate))))


def gradients_of(game, rule, batch, reduction=None, parts=1):
    """Return each player's gradients by name after one pass over the phases, without a step."""
    reduction = reduction or FastReduction(LocalCommunicator(CPU))
    micro_batch = len(batch) // parts if parts > 1 else None
    found = {}
    for phase in phases_of(rule, batch):
        for name in phase.players:
            for p in getattr(game, name).parameters():
                p.grad = None
        phase.gradients(game, reduction, reduction.split(phase.batch, micro_batch))
        for name in phase.players:
            found[name] = [p.grad.clone() for p in getattr(game, name).parameters()]
    return found


class Arena:
    """A game with players, a guard and a sample count: all that :func:`train_step` needs."""

    def __init__(self, game, config, reduction: Reduction | None = None):
        self.config = config
        self.state = TrainState.__new__(TrainState)
        state = self.state
        state.samples_seen = state.rollbacks = 0
        state.before_optimizers = lambda phase: None
        state.reduction = reduction or FastReduction(LocalCommunicator(CPU))
        self.rule = build_update_rule(config, game)
        state.players = {
            name: Player(
                getattr(game, name),
                getattr(config.optim, name),
                state.reduction,
                direction=self.rule.direction,
            )
            for name in ("generator", "discriminator")
        }
        state.average = MovingAverage(game.generator)
        state.game = game
        state.guard = Guard(config.health, ("generator", "discriminator"), CPU)
        state.scaler = LossScaler(CPU) if config.precision.dtype == "float16" else None
        self.game = game
        self.statistics, self.timer = Statistics(CPU), PhaseTimer(CPU)

    def step(self, batch):
        """Run one step of the real training."""
        train_step(self.state, self.rule, batch, self.config, self.statistics, self.timer)

    @property
    def point(self):
        """Return (θ, ψ) of a Dirac game."""
        return torch.cat([self.game.generator.theta, self.game.discriminator.psi]).detach().clone()


def play_dirac(game, rule, steps=500, **options):
    """Return the points (θ, ψ) [steps + 1, 2] from the start."""
    arena = Arena(game, config_of(rule, **options))
    points = [arena.point]
    for step in range(steps):
        arena.step(batch_of(torch.zeros(1, 1, dtype=torch.float64), step))
        points.append(arena.point)
    return torch.stack(points)
