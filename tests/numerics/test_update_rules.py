"""Update rules compared with published trajectories, each other, and two plain backward passes."""

import weakref

import pytest
import torch
from torch import nn

from games import (
    Arena,
    batch_of,
    config_of,
    dirac_game,
    gradients_of,
    phases_of,
    rule_of,
)
from gatdist.common.errors import ConfigError
from gatdist.config import Schedule
from gatdist.game import Game, Loss
from gatdist.game.losses import losses
from gatdist.game.penalties import ScheduledPenalty, penalties
from gatdist.models import mlp
from gatdist.models.image import residual
from support import refused


def test_discriminator_step_raises_its_accuracy():
    """Fixes the sign: read literally, the article would train the discriminator to be wrong."""
    torch.manual_seed(0)
    discriminator = mlp.PointDiscriminator(sample_shape=(2,), num_classes=0, width=16).double()
    generator = mlp.PointGenerator(
        latent_size=4, sample_shape=(2,), num_classes=0, width=16
    ).double()
    game = Game(generator, discriminator, losses["minimax"], 0, 4)
    batch = batch_of(torch.randn(256, 2, dtype=torch.float64) + 2)

    def value():
        with torch.no_grad():
            real, fake = discriminator(batch.real), discriminator(generator(game.latents(batch)))
            return (torch.sigmoid(real).log() + (1 - torch.sigmoid(fake)).log()).mean()

    rule = rule_of(game, "alternating")
    before = value()
    phase = next(phases_of(rule, batch))
    assert phase.players == ("discriminator",)
    phase.backward(phase.batch)
    with torch.no_grad():
        for p in discriminator.parameters():
            p -= 0.01 * p.grad
    assert value() > before


def image_game(loss, r1=0.0, r2=0.0, num_classes=0, every=1):
    torch.manual_seed(1)
    generator = residual.ResidualGenerator(
        latent_size=6, sample_shape=(1, 6, 9), num_classes=num_classes, width=4
    )
    discriminator = residual.ResidualDiscriminator(
        sample_shape=(1, 6, 9), num_classes=num_classes, width=4
    )
    for network in (generator, discriminator):
        for p in network.parameters():
            nn.init.normal_(p, std=0.3)  # no zeros, so that every path has a gradient
    scheduled = [
        ScheduledPenalty(n, penalties[n], Schedule.constant(s), every)
        for n, s in (("r1", r1), ("r2", r2))
        if s
    ]
    return Game(generator.double(), discriminator.double(), losses[loss], 3, 6, tuple(scheduled))


def reference_gradients(game, batch):
    """Return both gradients at one point by two plain, separate backward passes."""
    fakes = game.generator(game.latents(batch), batch.labels)
    real_x = batch.real.clone().requires_grad_()
    fake_x = fakes.detach().requires_grad_()
    real, fake = game.discriminator(real_x, batch.labels), game.discriminator(fake_x, batch.labels)
    loss = game.loss.discriminator(real, fake).mean()
    for scheduled in game.penalties:
        x, logits = (real_x, real) if scheduled.name == "r1" else (fake_x, fake)
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        loss = loss + scheduled.strength.at(0) * scheduled.every_steps * g.square().sum() / 2 / len(
            x
        )
    d = torch.autograd.grad(loss, list(game.discriminator.parameters()))
    g_loss = game.loss.generator(real.detach(), game.discriminator(fakes, batch.labels)).mean()
    g = torch.autograd.grad(g_loss, list(game.generator.parameters()))
    return g, d


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize(("r1", "r2"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("loss", sorted(losses.names()))
@pytest.mark.parametrize("rule", ["simultaneous", "one_stage"])
def test_one_backward_gives_both_gradients(rule, loss, r1, r2, num_classes):
    if rule == "one_stage" and losses[loss].ratio is None:
        pytest.skip(f"{loss} has no ratio")
    game = image_game(loss, r1, r2, num_classes, every=2)
    labels = torch.arange(8) % num_classes if num_classes else None
    batch = batch_of(torch.randn(8, 1, 6, 9, dtype=torch.float64), labels=labels)
    expected = reference_gradients(game, batch)
    found = gradients_of(game, rule_of(game, rule), batch)
    for name, gradients in zip(("generator", "discriminator"), expected, strict=True):
        for mine, g in zip(found[name], gradients, strict=True):
            torch.testing.assert_close(mine, g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "options"),
    [("consensus", {}), ("competitive", {"tolerance": 1e-12, "max_iterations": 200})],
)
def test_second_order_rule_computes_a_single_part_once_and_several_separately(rule, options):
    game = image_game("minimax", r1=0.7)
    batch = batch_of(torch.randn(8, 1, 6, 9, dtype=torch.float64))

    def play(parts):
        played, made = rule_of(game, rule, rule_options=options), []
        losses_of = played.losses

        def losses_alone(part):
            assert all(others() is None for others in made)  # no two graphs in memory at once
            losses = losses_of(part)
            made.append(weakref.ref(losses))
            return losses

        played.losses = losses_alone
        return gradients_of(game, played, batch, parts=parts), len(made)

    expected, count = play(parts=1)
    assert count == 1
    found, count = play(parts=2)
    assert count >= 4
    for name, gradients in expected.items():
        for mine, g in zip(found[name], gradients, strict=True):
            torch.testing.assert_close(mine, g, rtol=1e-7, atol=1e-9)


def test_lazy_penalties_are_evaluated_on_their_steps_only():
    game = image_game("relativistic", r1=1.0, r2=1.0, every=3)
    rule = rule_of(game, "alternating")
    real = torch.randn(4, 1, 6, 9, dtype=torch.float64)
    shown = []
    for step in range(6):
        phase = next(phases_of(rule, batch_of(real, step)))
        observations = phase.backward(phase.batch)
        shown.append({"penalty/r1", "penalty/r2"} <= observations.keys())
    assert shown == [True, False, False, True, False, False]


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    game = dirac_game("minimax", r1=0.6)
    phase = next(phases_of(rule_of(game, "alternating"), batch_of(torch.ones(5, 1).double())))
    observations = phase.backward(phase.batch)
    torch.testing.assert_close(observations["penalty/r1"], torch.full((5,), 0.6 / 2).double())


@pytest.mark.parametrize("order", ["discriminator_first", "generator_first"])
def test_alternating_updates_the_second_player_at_the_new_point_of_the_first(order):
    game = dirac_game("nonsaturating")
    arena = Arena(game, config_of("alternating", order=order, rate=0.5))
    arena.step(batch_of(torch.zeros(1, 1).double()))
    sigma = torch.sigmoid(torch.tensor(-1.0).double())  # of the fakes' logit ψθ
    theta, psi = torch.tensor(1.0).double(), torch.tensor(-1.0).double()
    if order == "discriminator_first":
        psi = psi - 0.5 * sigma * theta
        theta = theta + 0.5 * psi * torch.sigmoid(-psi * theta)
    else:
        theta = theta + 0.5 * psi * (1 - sigma)
        psi = psi - 0.5 * theta * torch.sigmoid(psi * theta)
    torch.testing.assert_close(game.generator.theta[0].detach(), theta)
    torch.testing.assert_close(game.discriminator.psi[0].detach(), psi)


def test_alternating_computes_no_discriminator_gradient_in_the_generators_phase():
    game = image_game("relativistic")
    batch = batch_of(torch.randn(4, 1, 6, 9).double())
    phases = list(phases_of(rule_of(game, "alternating"), batch))
    phases[1].backward(batch)
    assert all(p.grad is None for p in game.discriminator.parameters())
    assert all(p.requires_grad for p in game.discriminator.parameters())
    assert all(p.grad is not None for p in game.generator.parameters())


def test_fresh_latents_differ_between_the_phases_and_shared_do_not():
    seen = []

    class Spy(nn.Module):
        def forward(self, latents, labels=None):
            seen.append(latents.detach().clone())
            return latents

    for mode in ("fresh", "shared"):
        game = Game(
            Spy(),
            mlp.PointDiscriminator(sample_shape=(2,), num_classes=0, width=4).double(),
            losses["minimax"],
            0,
            2,
        )
        rule = rule_of(game, "alternating", latents=mode)
        for phase in phases_of(rule, batch_of(torch.randn(4, 2).double())):
            if phase.name == "discriminator":
                phase.backward(phase.batch)
            else:
                with pytest.raises(RuntimeError):
                    phase.backward(phase.batch)  # the spy has no parameters
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])


def test_one_stage_rejects_a_loss_without_a_ratio_by_name():
    game = Game(nn.Identity(), nn.Identity(), Loss(lambda r, f: f, lambda r, f: -f), 0, 1)
    with refused(ConfigError, "game.loss"):
        rule_of(game, "one_stage", loss="mine")


def test_one_stage_rejects_a_discriminator_with_batch_normalization_by_name():
    discriminator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    game = Game(nn.Identity(), discriminator, losses["minimax"], 0, 2)
    with refused(ConfigError, "game.update_rule"):
        rule_of(game, "one_stage")


def test_discriminator_with_several_logits_per_sample_is_rejected():
    class Patches(nn.Linear):
        def forward(self, samples, labels=None):
            return super().forward(samples)

    generator = mlp.PointGenerator(latent_size=2, sample_shape=(2,), num_classes=0).double()
    game = Game(generator, Patches(2, 3).double(), losses["minimax"], 0, 2)
    with refused(ConfigError, "model.discriminator.name"):
        gradients_of(game, rule_of(game, "alternating"), batch_of(torch.zeros(4, 2).double()))
