"""Small games with known behaviour, played by the real update rules."""

from __future__ import annotations

import torch
from torch import nn

from gatdist.config import parse_config
from gatdist.game import Batch, Game, update_rules
from gatdist.game.losses import losses
from gatdist.game.penalties import ScheduledPenalty, penalties


class DiracGenerator(nn.Module):
    """Every fake is θ, whatever the latent."""

    def __init__(self, theta=1.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, latents, labels=None):
        return self.theta.expand(len(latents), 1)


class DiracDiscriminator(nn.Module):
    """D(x) = ψ x. It starts at −1: the paper, which calls fakes what we call real, starts at 1."""

    def __init__(self, psi=-1.0):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([psi], dtype=torch.float64))

    def forward(self, samples, labels=None):
        return (samples * self.psi)[:, 0]


def dirac_game(loss, r1=0.0):
    """Mescheder et al. 2018: the real distribution is a point at 0."""
    scheduled = (ScheduledPenalty("r1", penalties["r1"], r1, 1),) if r1 else ()
    return Game(DiracGenerator(), DiracDiscriminator(), losses[loss], 0, 1, scheduled)


def rule_of(game, name, **options):
    """The update rule ``name`` for ``game``."""
    values = {
        "run": {"total_samples": 64},
        "data": {"url": "builtin:ring"},
        "game": {"update_rule": name} | options,
    }
    return update_rules[name](game, parse_config(values).game)


def batch_of(real, step=0, labels=None):
    """A batch at the start of a run."""
    return Batch(real, labels, torch.arange(len(real)) + step * len(real), step)


def descend(game, rule, batch, rate):
    """Plain gradient descent on each phase's players."""
    networks = {"generator": game.generator, "discriminator": game.discriminator}
    for phase in rule.phases(batch):
        parameters = [p for name in phase.players for p in networks[name].parameters()]
        for p in parameters:
            p.grad = None
        observations = phase.backward()
        with torch.no_grad():
            for p in parameters:
                p -= rate * p.grad
    return observations


def play_dirac(loss, rule, steps=500, rate=0.2, r1=0.0, **options):
    """Radius after ``steps`` from (1, −1)."""
    game = dirac_game(loss, r1)
    the_rule = rule_of(game, rule, **options)
    for step in range(steps):
        descend(game, the_rule, batch_of(torch.zeros(1, 1, dtype=torch.float64), step), rate)
    return torch.cat([game.generator.theta, game.discriminator.psi]).norm().item()
