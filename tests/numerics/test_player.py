"""Optimizer steps of a player, its learning rate schedule and its average."""

import copy

import pytest
import torch
from torch import nn

from gatdist.config import PlayerOptimConfig
from gatdist.game import Hyperparameters
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.reduction import FastReduction
from gatdist.training.player import MovingAverage, Player, ema_weight

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
    settings = Hyperparameters(0.1 * factor, player.hyperparameters(0).betas)
    player.step(torch.tensor(finite), player.gradient_norm(), settings)


def snapshot(player):
    return {name: tensor.clone() for name, tensor in player.tensors("p")}


@pytest.mark.parametrize("options", KINDS + DIRECTIONS)
@pytest.mark.parametrize("at_step", [0, 2])
def test_nonfinite_step_leaves_no_trace(options, at_step):
    """The final state equals that of a run without the non-finite step."""
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
def test_player_steps_like_torchs_plain_optimizer(options):
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


def test_norm_is_that_of_the_whole_gradient_and_detects_one_bad_entry():
    player = player_with(name="sgd")
    give_gradient(player, 2.0)
    assert player.gradient_norm().item() == pytest.approx((8 * 4) ** 0.5)
    player.parameters["bias"].grad[1] = float("inf")
    assert not player.gradient_norm().isfinite()


def test_clipping_bounds_the_whole_gradient_and_leaves_small_ones_unchanged():
    for value, moved in ((100.0, 0.1 * 0.5), (0.01, 0.1 * 0.01 * 8**0.5)):
        player = player_with(name="sgd", clip_norm=0.5)
        before = torch.cat([p.detach().flatten().clone() for p in player.parameters.values()])
        give_gradient(player, value)
        move(player)
        after = torch.cat([p.detach().flatten() for p in player.parameters.values()])
        assert (after - before).norm().item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("options", KINDS + DIRECTIONS)
def test_player_resumes_exactly(options):
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


def test_adam_is_corrected_for_separate_penalty_steps():
    """Karras et al. 2020: lr·c and β^c with c = k/(k + 1), so that k + 1 steps equal k before."""
    config = PlayerOptimConfig(learning_rate=0.1, betas=[0.5, 0.99])
    player = Player(nn.Linear(3, 2), config, REDUCTION, lazy_steps=4)
    settings = player.hyperparameters(0)
    assert settings.learning_rate == pytest.approx(0.1 * 0.8)
    assert settings.betas == pytest.approx((0.5**0.8, 0.99**0.8))
    plain = Player(nn.Linear(3, 2), PlayerOptimConfig(name="sgd"), REDUCTION, lazy_steps=4)
    assert plain.hyperparameters(0).learning_rate == PlayerOptimConfig().learning_rate.start


def test_average_decays_by_half_in_a_half_life_for_any_batch_size():
    for batch in (10, 25, 100):
        network = nn.Linear(2, 1).double()
        nn.init.ones_(network.weight)
        average = MovingAverage(copy.deepcopy(network))
        nn.init.zeros_(network.weight)
        for _ in range(100 // batch):
            average.update(network, ema_weight(100.0, batch))
        assert average.network.weight.flatten().tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_average_with_a_half_life_of_zero_equals_the_generator():
    network = nn.Linear(2, 1)
    average = MovingAverage(network)
    nn.init.normal_(network.weight)
    average.update(network, ema_weight(0.0, 8))
    assert torch.equal(average.network.weight, network.weight)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.75, 1.0])
def test_average_is_the_same_for_a_weight_on_the_device(weight):
    network, other = nn.Linear(5, 3), nn.Linear(5, 3)
    by_number, by_tensor = MovingAverage(network), MovingAverage(network)
    by_number.update(other, weight)
    by_tensor.update(other, torch.tensor(weight))
    assert torch.equal(by_number.network.weight, by_tensor.network.weight)


def test_average_has_no_gradient_and_copies_buffers():
    network = nn.BatchNorm1d(2)
    network.register_buffer("codes", torch.zeros(3))
    average = MovingAverage(network)
    network.codes += 1
    average.update(network, 0.5)
    assert torch.equal(average.network.codes, network.codes)
    assert not any(p.requires_grad for p in average.network.parameters())
