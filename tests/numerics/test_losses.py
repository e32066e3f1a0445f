"""Losses are finite, have the right sign, and the ratio that the one-stage step uses."""

import math

import pytest
import torch

from gatdist.game.losses import Sum, losses

NAMES = losses.names()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_their_gradients_are_finite_for_huge_logits(name, dtype):
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype)
    for function in (losses[name].discriminator, losses[name].generator):
        real = logits.repeat_interleave(5).requires_grad_()
        fake = logits.repeat(5).requires_grad_()
        loss = function(real, fake)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert fake.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if losses[name].ratio])
def test_ratio_is_the_quotient_of_both_derivatives(name):
    real = torch.linspace(-6, 6, 41, dtype=torch.float64)
    fake = torch.linspace(5, -5.1, 41, dtype=torch.float64).requires_grad_()
    (d,) = torch.autograd.grad(losses[name].discriminator(real, fake).sum(), fake)
    (g,) = torch.autograd.grad(losses[name].generator(real, fake).sum(), fake)
    torch.testing.assert_close(losses[name].ratio(real, fake.detach()), g / d, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_are_sums_are_marked(name):
    real, fake = torch.linspace(-3, 3, 50).double(), torch.linspace(4, -2, 50).double()
    nothing = torch.zeros_like(real)
    loss = losses[name].discriminator
    rest = loss(real, fake) - loss(real, nothing) - loss(nothing, fake) + loss(nothing, nothing)
    assert (rest.abs().max() < 1e-12) == isinstance(loss, Sum)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_monotonic_in_the_logits_of_fakes(name):
    real = torch.zeros(50, dtype=torch.float64)
    # Between the targets of least squares and the margins of the hinge.
    fake = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert (losses[name].generator(real, fake).diff() < 0).all()
    assert (losses[name].discriminator(real, fake).diff() > 0).all()
    assert (losses[name].discriminator(fake, real).diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [  # at r = 0.5, ℓ = −2
        ("minimax", 0.474077 + 0.126928, 0.474077 - 0.126928),
        ("nonsaturating", 0.474077 + 0.126928, 2.126928),
        ("least_squares", 0.25 + 4.0, 9.0),
        ("hinge", 0.5 + 0.0, 2.0),
        ("wasserstein", -2.5, 2.0),
        ("relativistic", 0.078889, 2.578889),
    ],
)
def test_losses_have_their_published_values(name, discriminator, generator):
    real, fake = torch.tensor([0.5]).double(), torch.tensor([-2.0]).double()
    assert losses[name].discriminator(real, fake).item() == pytest.approx(discriminator, abs=1e-5)
    assert losses[name].generator(real, fake).item() == pytest.approx(generator, abs=1e-5)


def test_every_loss_is_tested():
    assert set(NAMES) == {
        "hinge",
        "least_squares",
        "minimax",
        "nonsaturating",
        "relativistic",
        "wasserstein",
    }


@pytest.mark.parametrize("name", [name for name in NAMES if losses[name].zero_sum])
def test_zero_sum_losses_are_negatives_of_each_other(name):
    real = torch.linspace(-3, 3, 20, dtype=torch.float64)
    fake = torch.linspace(4, -4, 20, dtype=torch.float64).requires_grad_()
    (d,) = torch.autograd.grad(losses[name].discriminator(real, fake).sum(), fake)
    (g,) = torch.autograd.grad(losses[name].generator(real, fake).sum(), fake)
    torch.testing.assert_close(g, -d)


@pytest.mark.parametrize("name", ["minimax", "nonsaturating"])
def test_at_equilibrium_the_discriminators_loss_is_log_4(name):
    zero = torch.zeros(1, dtype=torch.float64)
    assert losses[name].discriminator(zero, zero).item() == pytest.approx(math.log(4))


def test_at_equilibrium_the_nonsaturating_generators_loss_is_log_2():
    zero = torch.zeros(1, dtype=torch.float64)
    assert losses["nonsaturating"].generator(zero, zero).item() == pytest.approx(math.log(2))


def test_minimax_generator_reports_the_articles_value():
    real, fake = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-1.2], dtype=torch.float64)
    value = -torch.log(torch.sigmoid(real)) + torch.log(1 - torch.sigmoid(fake))
    torch.testing.assert_close(losses["minimax"].generator(real, fake), value)


def test_minimax_saturates_where_nonsaturating_does_not():
    fake = torch.tensor([-20.0], dtype=torch.float64, requires_grad=True)
    real = torch.zeros(1, dtype=torch.float64)
    gradients = {
        name: torch.autograd.grad(losses[name].generator(real, fake).sum(), fake)[0].abs().item()
        for name in ("minimax", "nonsaturating")
    }
    assert gradients["minimax"] < 1e-8
    assert gradients["nonsaturating"] > 0.99
