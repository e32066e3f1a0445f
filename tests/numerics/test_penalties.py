"""Penalties compared with their definitions, and their schedules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from games import Arena, batch_of, config_of, dirac_game, phases_of, rule_of
from gatdist.config import BOTH, Schedule
from gatdist.game import Game, Hyperparameters
from gatdist.game.adaptive_state import Averages
from gatdist.game.losses import losses
from gatdist.game.penalties import ScheduledPenalty, penalties
from gatdist.models import mlp
from gatdist.models.image import residual
from gatdist.models.layers import SpectralNorm, add_spectral_norm, normalized_weights
from gatdist.parallel import draws


def scheduled(name, strength, every_steps=1):
    return ScheduledPenalty(name, penalties[name], Schedule.constant(strength), every_steps)


def image_game(*due, loss="nonsaturating", separate=False):
    torch.manual_seed(1)
    shape = {"sample_shape": (1, 6, 9), "num_classes": 0, "width": 4}
    generator = residual.ResidualGenerator(latent_size=6, **shape)
    discriminator = residual.ResidualDiscriminator(**shape)
    for network in (generator, discriminator):
        for p in network.parameters():
            nn.init.normal_(p, std=0.3)
    decays = {tag: d for p in due for tag, d in p.penalty.averages.items()}
    return Game(
        generator.double(),
        discriminator.double(),
        losses[loss],
        3,
        6,
        due,
        separate=separate,
        averages=Averages(decays, dtype=torch.float64),
    )


def real_batch(step=0, n=6):
    generator = torch.Generator().manual_seed(step)
    return batch_of(torch.randn(n, 1, 6, 9, generator=generator, dtype=torch.float64), step)


def observed(game, rule, batch, player):
    phase = next(p for p in phases_of(rule, batch) if player in p.players)
    return phase.backward(phase.batch)


def test_wgan_gp_is_the_squared_deviation_of_the_interpolates_gradient_norm_from_one():
    game = image_game(scheduled("wgan_gp", 10.0))
    batch = real_batch()
    found = observed(game, rule_of(game, "alternating"), batch, "discriminator")["penalty/wgan_gp"]
    share = draws.uniform(3, "between", batch.positions, dtype=torch.float64).view(-1, 1, 1, 1)
    x = (share * batch.real + (1 - share) * game.fakes(batch)["sample"]).requires_grad_()
    for i in range(len(batch)):
        (gradient,) = torch.autograd.grad(game.discriminator(x)[i], x)
        assert gradient[:i].abs().max() == 0 if i else True
        assert found[i].item() == pytest.approx(10 * (gradient[i].norm().item() - 1) ** 2)


def test_zero_gradient_has_a_finite_penalty_and_derivative():
    game = dirac_game("wasserstein", psi=0.0, wgan_gp=1.0)
    for phase in phases_of(rule_of(game, "simultaneous"), batch_of(torch.zeros(4, 1).double())):
        observations = phase.backward(phase.batch)
    torch.testing.assert_close(observations["penalty/wgan_gp"], torch.ones(4).double())
    assert game.discriminator.psi.grad.isfinite().all()


def test_lecam_pulls_logits_towards_the_other_sides_average():
    game = image_game(scheduled("lecam", 0.5), loss="hinge")
    arena = Arena(game, config_of("simultaneous", rate=1e-4))
    real_average = fake_average = 0.0
    for step in range(4):
        batch = real_batch(step)
        with torch.no_grad():
            real = game.discriminator(batch.real)
            fake = game.discriminator(game.fakes(batch)["sample"])
        expected = 0.5 * ((real - fake_average).square() + (fake - real_average).square())
        (phase,) = phases_of(arena.rule, batch)
        torch.testing.assert_close(phase.backward(batch)["penalty/lecam"], expected)
        arena.step(batch)
        real_average += 0.01 * (real.mean().item() - real_average)
        fake_average += 0.01 * (fake.mean().item() - fake_average)
        assert game.averages["logits/real"].item() == pytest.approx(real_average, rel=1e-9)
        assert game.averages["logits/fake"].item() == pytest.approx(fake_average, rel=1e-9)


def test_path_length_is_the_deviation_of_the_projected_jacobian_from_its_average():
    game = image_game(scheduled("path_length", 2.0))
    arena = Arena(game, config_of("simultaneous", rate=0.01))
    average = 0.0
    for step in range(3):
        batch = real_batch(step, n=3)
        (phase,) = phases_of(arena.rule, batch)
        found = phase.backward(batch)["penalty/path_length"]
        y = draws.normal(3, "projections", batch.positions, (1, 6, 9), torch.float64)
        lengths = []
        for i, z in enumerate(game.latents(batch)):
            jacobian = torch.autograd.functional.jacobian(
                lambda latent: game.generator(latent[None])[0], z
            )  # [1, 6, 9, 6]
            lengths.append((y[i, ..., None] * jacobian).sum((0, 1, 2)).norm() / 54**0.5)
        lengths = torch.stack(lengths)
        torch.testing.assert_close(found, 2 * (lengths - average).square())
        arena.step(batch)
        average += 0.01 * (lengths.mean().item() - average)
        assert game.averages["path_length"].item() == pytest.approx(average, rel=1e-9)


def test_path_length_gradient_is_equal_for_every_rule_at_one_point():
    penalty = scheduled("path_length", 2.0)
    gradients = {}
    for rule in ("simultaneous", "one_stage", "extragradient"):
        game = image_game(penalty)
        phase = next(phases_of(rule_of(game, rule), real_batch()))
        phase.backward(phase.batch)
        gradients[rule] = torch.cat([p.grad.flatten() for p in game.generator.parameters()])
    torch.testing.assert_close(gradients["one_stage"], gradients["simultaneous"])
    torch.testing.assert_close(gradients["extragradient"], gradients["simultaneous"])


def test_separate_penalties_have_their_own_steps_and_are_not_in_the_losses():
    r1 = scheduled("r1", 1.0, 3)
    joined, separate = image_game(r1), image_game(r1, separate=True)
    config = config_of("one_stage", penalties={"r1": {"strength": 1.0, "every_steps": 3}})
    arena = Arena(separate, config)
    names = []
    for step in range(4):
        batch = real_batch(step)
        phases = list(arena.rule.all_phases(next_step(arena, batch)))
        names.append([phase.name for phase in phases])
        arena.step(batch)
    assert names == [["both", "discriminator_penalty"], ["both"], ["both"], names[0]]

    def gradient(game, phase):
        game.discriminator.zero_grad()
        phase.backward(phase.batch)
        return torch.cat([p.grad.flatten() for p in game.discriminator.parameters()])

    separate = image_game(r1, separate=True)
    batch = real_batch()
    apart = Arena(separate, config)
    main, own = apart.rule.all_phases(next_step(apart, batch))
    both = gradient(separate, main) + gradient(separate, own)
    together = Arena(joined, config_of("one_stage"))
    (whole,) = together.rule.all_phases(next_step(together, batch))
    torch.testing.assert_close(both, gradient(joined, whole))


def next_step(arena, batch):
    from gatdist.game import Step

    return Step(batch, dict.fromkeys(BOTH, Hyperparameters(0.1)))


def test_each_discriminator_step_uses_its_own_batch_and_the_generator_the_last():
    game = dirac_game("minimax")
    rule = rule_of(game, "alternating", num_discriminator_steps=3)
    batch = batch_of(torch.arange(6.0).view(6, 1).double())
    seen = [(phase.name, phase.batch.real.flatten().tolist()) for phase in phases_of(rule, batch)]
    assert seen == [
        ("discriminator", [0.0, 1.0]),
        ("discriminator", [2.0, 3.0]),
        ("discriminator", [4.0, 5.0]),
        ("generator", [4.0, 5.0]),
    ]


@pytest.mark.parametrize(("size", "expected"), [(4, [2.0, 3.0, 4.0, 5.0]), (1, [5.0])])
def test_generator_batch_takes_the_last_samples_of_the_step(size, expected):
    game = replace(dirac_game("minimax"), step_samples=6)
    rule = rule_of(game, "alternating", batch=2, num_discriminator_steps=3, generator_batch=size)
    batch = batch_of(torch.arange(6.0).view(6, 1).double())
    *_, last = phases_of(rule, batch)
    assert last.batch.real.flatten().tolist() == expected
    assert last.batch.positions.tolist() == [int(x) for x in expected]


# Spectral normalization


def spectral_norms(network):
    return {
        name: torch.linalg.matrix_norm(module.weight.detach().flatten(1), ord=2).item()
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
    }


def test_every_normalized_weight_has_norm_one_even_if_it_started_at_zero():
    torch.manual_seed(0)
    network = residual.ResidualDiscriminator(sample_shape=(1, 8, 8), num_classes=3, width=8)
    add_spectral_norm(network)
    for _ in range(200):
        for norm, weight in normalized_weights(network):
            norm.advance(weight)
    found = spectral_norms(network)
    assert len(found) > 5
    for name, norm in found.items():
        assert norm == pytest.approx(1.0, abs=1e-2), name


def test_evaluating_a_normalized_network_changes_nothing():
    torch.manual_seed(0)
    network = add_spectral_norm(mlp.PointDiscriminator(sample_shape=(2,), num_classes=0, width=8))
    before = {name: t.clone() for name, t in network.state_dict().items()}
    first = network(torch.ones(3, 2))
    assert torch.equal(first, network(torch.ones(3, 2)))
    after = network.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_optimizer_step_updates_singular_vectors_but_not_from_a_nonfinite_weight():
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    norm = SpectralNorm(weight)
    assert norm(weight)[0, 0].item() == pytest.approx(1.0, abs=1e-3)
    for _ in range(50):
        norm.advance(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    assert norm(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))[1, 1].item() == pytest.approx(1.0, abs=1e-3)
    norm.advance(torch.full((2, 2), float("nan")))
    assert norm.u.isfinite().all()


def test_gradient_of_a_normalized_weight_is_that_of_w_over_sigma():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64)
    norm = SpectralNorm(weight)
    assert torch.autograd.gradcheck(norm, (weight.requires_grad_(),))
