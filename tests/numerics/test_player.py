"""A player moves as its optimizer says, or not at all; schedule and average follow the clock."""

import copy

import pytest
import torch
from torch import nn

from gatdist.config import PlayerOptimConfig
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction
from gatdist.training.player import MovingAverage, Player, learning_rate_factor

REDUCTION = FastReduction(LocalCommunicator(torch.device("cpu")))
KINDS = [
    {"name": "adam", "betas": [0.5, 0.9]},
    {"name": "adam", "weight_decay": 0.1},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
]
DIRECTIONS = [
    {"name": "sgd", "direction": "optimistic"},
    {"name": "adam", "direction": "optimistic"},
    {"name": "sgd", "direction": "conjugate", "conjugate_beta": "HZ"},
]


def player_with(**options):
    torch.manual_seed(0)
    return Player(nn.Linear(3, 2), PlayerOptimConfig(learning_rate=0.1, **options), REDUCTION)


def give_gradient(player, value=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in player.parameters.values():
        p.grad = (
            torch.randn(p.shape, generator=generator)
            if value is None
            else torch.full_like(p, value)
        )


def move(player, finite=1.0, factor=1.0):
    player.step(torch.tensor(finite), player.gradient_norm(), 0.1 * factor)


def snapshot(player):
    return {name: tensor.clone() for name, tensor in player.tensors("p")}


@pytest.mark.parametrize("options", KINDS + DIRECTIONS)
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_leaves_no_trace(options, at_step):
    """With the bad step in between, everything ends as if it had never been."""
    disturbed, undisturbed = player_with(**options), player_with(**options)
    for step in range(4):
        if step == at_step:
            give_gradient(disturbed, float("nan"))
            move(disturbed, finite=0.0)
        for player in (disturbed, undisturbed):
            give_gradient(player, seed=step)
            move(player)
    expected = snapshot(undisturbed)
    for name, tensor in snapshot(disturbed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("options", KINDS)
def test_a_player_moves_as_torchs_plain_optimizer(options):
    player = player_with(**options)
    reference = nn.Linear(3, 2)
    reference.load_state_dict(player.bare.state_dict())
    if options["name"] == "sgd":
        optimizer = torch.optim.SGD(
            reference.parameters(), 0.05, momentum=options.get("momentum", 0.0)
        )
    else:
        kind = torch.optim.AdamW if "weight_decay" in options else torch.optim.Adam
        decay = options.get("weight_decay", 0.0)
        betas = tuple(options.get("betas", (0.0, 0.99)))
        optimizer = kind(reference.parameters(), 0.05, betas=betas, weight_decay=decay)
    for step in range(5):
        give_gradient(player, seed=step)
        for p, mine in zip(reference.parameters(), player.parameters.values(), strict=True):
            p.grad = mine.grad.clone()
        move(player, factor=0.5)
        optimizer.step()
    for p, mine in zip(reference.parameters(), player.parameters.values(), strict=True):
        torch.testing.assert_close(mine, p)


def test_the_norm_is_that_of_the_whole_gradient_and_sees_one_bad_entry():
    player = player_with(name="sgd")
    give_gradient(player, 2.0)
    assert player.gradient_norm().item() == pytest.approx((8 * 4) ** 0.5)
    player.parameters["bias"].grad[1] = float("inf")
    assert not player.gradient_norm().isfinite()


def test_clipping_bounds_the_whole_gradient_and_leaves_small_ones_alone():
    for value, moved in ((100.0, 0.1 * 0.5), (0.01, 0.1 * 0.01 * 8**0.5)):
        player = player_with(name="sgd", clip_norm=0.5)
        before = torch.cat([p.detach().flatten().clone() for p in player.parameters.values()])
        give_gradient(player, value)
        move(player)
        after = torch.cat([p.detach().flatten() for p in player.parameters.values()])
        assert (after - before).norm().item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("options", KINDS + DIRECTIONS)
def test_a_player_resumes_exactly(options):
    player = player_with(**options)
    for step in range(3):
        give_gradient(player, seed=step)
        move(player)
    resumed = Player(nn.Linear(3, 2), player.config, REDUCTION)
    saved = snapshot(player)
    with torch.no_grad():
        for name, tensor in resumed.tensors("p"):
            tensor.copy_(saved[name])
    for each in (player, resumed):
        give_gradient(each, seed=9)
        move(each)
    expected = snapshot(player)
    found = snapshot(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_schedule_warms_up_stays_and_decays_to_its_final_fraction():
    config = PlayerOptimConfig(
        warmup_samples=100, decay="linear", decay_start_samples=500, final_fraction=0.2
    )
    factors = [
        learning_rate_factor(config, seen, 1000) for seen in (0, 49, 99, 100, 500, 750, 1000, 2000)
    ]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    cosine = PlayerOptimConfig(decay="cosine")
    assert learning_rate_factor(cosine, 500, 1000) == pytest.approx(0.5)
    assert learning_rate_factor(cosine, 250, 1000) == pytest.approx((1 + 0.5**0.5) / 2)


def test_adam_is_corrected_for_penalties_with_steps_of_their_own():
    """Karras et al. 2020: lr·c and β^c with c = k/(k + 1), so that k + 1 steps do what k did."""
    config = PlayerOptimConfig(learning_rate=0.1, betas=[0.5, 0.99])
    player = Player(nn.Linear(3, 2), config, REDUCTION, lazy_steps=4)
    assert player.rate(0, 1) == pytest.approx(0.1 * 0.8)
    assert player.optimizer.betas == pytest.approx((0.5**0.8, 0.99**0.8))
    plain = Player(nn.Linear(3, 2), PlayerOptimConfig(name="sgd"), REDUCTION, lazy_steps=4)
    assert plain.rate(0, 1) == PlayerOptimConfig().learning_rate


def test_without_a_schedule_the_rate_is_constant():
    assert learning_rate_factor(PlayerOptimConfig(), 10**9, 10) == 1.0


def test_the_average_forgets_half_in_a_half_life_whatever_the_batch_size():
    for batch in (10, 25, 100):
        network = nn.Linear(2, 1).double()
        nn.init.ones_(network.weight)
        average = MovingAverage(copy.deepcopy(network), half_life_samples=100.0)
        nn.init.zeros_(network.weight)
        for _ in range(100 // batch):
            average.update(network, batch)
        assert average.network.weight.flatten().tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_the_average_learns_nothing_by_gradient_and_copies_buffers():
    network = nn.BatchNorm1d(2)
    average = MovingAverage(network, 100.0)
    network(torch.randn(8, 2))
    average.update(network, 8)
    assert torch.equal(average.network.running_mean, network.running_mean)
    assert not any(p.requires_grad for p in average.network.parameters())
