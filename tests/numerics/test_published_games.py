"""Trajectories of every update rule on games with published or exactly known behaviour."""

import math

import pytest
import torch

from games import bilinear_loss, dirac_game, play_dirac

ETA = 0.2


def bilinear(rule, alpha=1.0, steps=50, theta=0.5, psi=0.5, **options):
    """Run min_θ max_ψ αθψ by ``rule``; return points [steps + 1, 2]."""
    return play_dirac(
        dirac_game(bilinear_loss(alpha), theta, psi), rule, steps, rate=ETA, **options
    )


def factors(points):
    """Return ‖w‖² divided by that of the previous step."""
    squared = points.square().sum(1)
    return squared[1:] / squared[:-1]


# game.md, §6 A; a = η α.
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("rule", "options", "factor"),
    [
        ("simultaneous", {}, lambda a: 1 + a**2),
        ("one_stage", {}, lambda a: 1 + a**2),
        ("extragradient", {}, lambda a: 1 - a**2 + a**4),
        ("competitive", {}, lambda a: 1 / (1 + a**2)),
        (
            "consensus",
            {"rule_options": {"strength": 0.7}},
            lambda a: (1 - 0.7 * a**2 / ETA) ** 2 + a**2,
        ),
    ],
)
def test_bilinear_game_changes_its_radius_by_the_exact_factor(rule, options, factor, alpha):
    found = factors(bilinear(rule, alpha, **options))
    # Consensus: F + γ ∇½‖F‖² with ½‖F‖² = ½ α² ‖w‖², so w shrinks by 1 − ηγα² before it turns.
    torch.testing.assert_close(
        found, torch.full_like(found, factor(ETA * alpha)), rtol=1e-12, atol=0
    )


def test_optimistic_descent_converges_at_its_limit_factor_and_only_below_its_bound():
    for alpha in (0.5, 1.0, 2.0):
        a = ETA * alpha
        found = bilinear("optimistic", alpha, steps=400).square().sum(1)
        # The squared modulus of the dominant root, over many steps.
        measured = (found[-1] / found[200]).item() ** (1 / 200)
        assert measured == pytest.approx((1 + math.sqrt(1 - 4 * a * a)) / 2, rel=1e-3)
    below, above = (bilinear("optimistic", a / ETA, steps=1000) for a in (0.57, 0.585))
    assert below[-1].norm() < 1e-3 < 1 < above[-1].norm()  # stable iff a < 1/√3 = 0.577


def test_first_optimistic_step_is_plain_and_the_second_uses_the_previous_gradient():
    plain, found = bilinear("simultaneous", steps=1), bilinear("optimistic", steps=2)
    torch.testing.assert_close(found[1], plain[1], rtol=0, atol=1e-15)

    def field(w):
        return torch.stack([w[1], -w[0]])

    expected = found[1] - 2 * ETA * field(found[1]) + ETA * field(found[0])
    torch.testing.assert_close(found[2], expected, rtol=0, atol=1e-15)


def test_previous_gradient_is_a_copy():
    """An alias, zeroed in place, would silently give descent at twice the rate: ‖w‖ 71.42."""
    points = play_dirac(dirac_game(bilinear_loss(1.0), 1.0, 1.0), "optimistic", 200, rate=0.1)
    assert points[-1].norm().item() == pytest.approx(0.520, abs=0.01)


@pytest.mark.parametrize("order", ["generator_first", "discriminator_first"])
def test_alternating_descent_keeps_its_invariant(order):
    points = bilinear("alternating", 2.0, steps=300, order=order)
    theta, psi = points.T
    sign = 1 if order == "discriminator_first" else -1
    kept = theta**2 + psi**2 + sign * (ETA * 2.0) * theta * psi
    torch.testing.assert_close(kept, kept[:1].expand_as(kept), rtol=1e-12, atol=0)


# Schäfer & Anandkumar 2019's example: η = .2, 50 steps from (.5, .5).
@pytest.mark.parametrize(
    ("alpha", "simultaneous", "competitive"),
    [(1, 2.67, 0.375), (3, 2.18e3, 4.6e-4), (6, 4.8e9, 2.1e-10)],
)
def test_competitive_descent_ends_where_its_paper_does(alpha, simultaneous, competitive):
    for rule, published in (("simultaneous", simultaneous), ("competitive", competitive)):
        points = bilinear(rule, float(alpha))
        assert (points[-1].norm() / points[0].norm()).item() == pytest.approx(published, rel=0.02)


# Mescheder et al. 2018: h = 0.2, 500 steps from (1, −1) in gatdist's signs.
@pytest.mark.parametrize(
    ("loss", "rule", "r1", "radius"),
    [
        ("minimax", "simultaneous", 0.0, 3.09695),
        ("minimax", "one_stage", 0.0, 3.09695),
        ("minimax", "alternating", 0.0, 1.42102),
        ("minimax", "simultaneous", 0.3, 2.643e-6),
        ("minimax", "one_stage", 0.3, 2.643e-6),
        ("minimax", "alternating", 0.3, 2.301e-7),
        ("nonsaturating", "simultaneous", 0.3, 2.212e-6),
    ],
)
def test_dirac_gan_ends_at_the_published_radius(loss, rule, r1, radius):
    orders = ["discriminator_first", "generator_first"] if rule == "alternating" else [None]
    found = [
        play_dirac(
            dirac_game(loss, **({"r1": r1} if r1 else {})), rule, **({"order": o} if o else {})
        )[-1]
        .norm()
        .item()
        for o in orders
    ]
    assert any(value == pytest.approx(radius, rel=1e-3) for value in found), found


def test_dirac_wgan_without_clipping_grows_and_its_penalty_does_not_converge():
    radii = play_dirac(dirac_game("wasserstein"), "simultaneous", 100).square().sum(1)
    torch.testing.assert_close(radii[1:] / radii[:-1], torch.full((100,), 1.04).double())
    points = play_dirac(dirac_game("wasserstein", wgan_gp=0.7), "simultaneous", 2000)
    late = points[-200:].norm(dim=1)
    assert 0.1 < late.max() < 10


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_r1_contracts_dirac_gan_at_the_published_modulus(gamma):
    """Near the equilibrium, by 1 − hγ + h²/4 on the squared modulus for γ ≤ 1."""
    a, b, c = play_dirac(dirac_game("minimax", theta=1e-4, psi=1e-4, r1=gamma), "simultaneous", 2)
    # The squared modulus of a pair of eigenvalues is the determinant.
    determinant = torch.stack([b, c]).det() / torch.stack([a, b]).det()
    assert determinant.item() == pytest.approx(1 - ETA * gamma + ETA**2 / 4, rel=1e-6)


@pytest.mark.parametrize("beta", ["FR", "PR", "HS", "DY", "HZ", "FR-PR", "HS-DY"])
def test_conjugate_directions_follow_their_formula(beta):
    points = bilinear("conjugate", steps=3, optim={"conjugate_beta": beta})

    def field(w):
        return torch.stack([w[1], -w[0]])

    # Each player separately, one number each.
    for player in (0, 1):
        direction = before = None
        for step in range(3):
            g = field(points[step])[player]
            if direction is None:
                new = -g
            else:
                y = g - before
                values = {
                    "FR": g * g / before**2,
                    "PR": g * y / before**2,
                    "HS": g * y / (direction * y),
                    "DY": g * g / (direction * y),
                    "HZ": (y - 2 * direction * y * y / (direction * y)) * g / (direction * y),
                }
                values["FR-PR"] = min(values["FR"], values["PR"]).clamp_min(0)
                values["HS-DY"] = min(values["HS"], values["DY"]).clamp_min(0)
                new = -g + values[beta] * direction
                if not (values[beta].isfinite() and new * g < 0):
                    new = -g
            torch.testing.assert_close(
                points[step + 1][player], points[step][player] + ETA * new, rtol=0, atol=1e-12
            )
            direction, before = new, g


@pytest.mark.parametrize("rule", ["extragradient", "optimistic"])
def test_lookahead_rules_find_the_centre_with_adam(rule):
    options = {"optim": {"name": "adam", "betas": [0.0, 0.9]}}
    found = {
        name: play_dirac(
            dirac_game(bilinear_loss(1.0), 0.5, 0.5), name, 1000, rate=0.01, **options
        )[-1].norm()
        for name in (rule, "simultaneous")
    }
    assert found[rule] < found["simultaneous"] / 3


def test_losses_at_equilibrium_are_those_of_a_coin():
    from gatdist.game.losses import losses

    zero = torch.zeros(1, dtype=torch.float64)
    assert losses["nonsaturating"].discriminator(zero, zero).item() == pytest.approx(math.log(4))
    assert losses["nonsaturating"].generator(zero, zero).item() == pytest.approx(math.log(2))
