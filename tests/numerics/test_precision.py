"""Other dtypes, layouts, compilation and compression give the same result within precision."""

import pytest
import torch

from gatdist.config import load_config
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.health import Guard, LossScaler
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, spawn

CPU = torch.device("cpu")
SHAPE, BATCH = (3, 16, 16), 8
BASE = [
    f"run.global_batch={BATCH}",
    "model.latent_size=16",
    'model.generator={name="residual", width=8, max_width=16}',
    'model.discriminator={name="residual", width=8, max_width=16}',
    "game.penalties={}",
    "game.loss=nonsaturating",
    "optim.generator.eps=1e-4",
    "optim.discriminator.eps=1e-4",
]
R1 = "game.penalties={r1={strength=1.0, every_steps=2}}"
RULES = ["alternating", "simultaneous", "one_stage"]


SMALL_TO_COMPILE = [
    f'model.{player}={{name="mlp", width=8, depth=1}}' for player in ("generator", "discriminator")
]


def train(overrides, steps=4, comm=None, shape=SHAPE):
    """Run a few steps on synthetic images; return each phase's gradient norms, and the state."""
    comm = comm or LocalCommunicator(CPU)
    config = load_config("digits", BASE + overrides)
    state = TrainState(config, comm, shape, 0)
    rule = state.rule(config)
    norms = []
    for player in state.players.values():

        def norm(unscale=None, original=player.gradient_norm):
            norms.append(original(unscale).item())
            return torch.tensor(norms[-1])

        player.gradient_norm = norm
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        real = torch.randn(BATCH, *shape, generator=generator).to(DTYPES[config.precision.dtype])
        if config.precision.channels_last:
            real = real.contiguous(memory_format=torch.channels_last)
        positions = torch.arange(BATCH) + BATCH * step
        mine = own_samples(config, comm)
        batch = Batch(real[mine], None, positions[mine], step, len(real))
        train_step(state, rule, batch, config, Statistics(CPU), PhaseTimer(CPU))
    return norms, state


def weights(state):
    return {
        name: torch.cat([p.detach().flatten().double() for p in player.bare.parameters()])
        for name, player in state.players.items()
    }


def distance(state, reference):
    """Return the distance of two states, relative to the reference's change since the start."""
    mine, theirs = weights(state), weights(reference[1])
    start = weights(train([], steps=0)[1])
    return max(((mine[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()).item() for n in mine)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-3), ("bfloat16", 0.3), ("float16", 0.1)]
)
def test_other_dtypes_follow_float32(dtype, tolerance, rule):
    overrides = [f"game.update_rule={rule}", R1]
    reference = train(overrides)
    norms, state = train([*overrides, f"precision.dtype={dtype}"])
    for mine, theirs in zip(norms, reference[0], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert distance(state, reference) < tolerance
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert {p.dtype for p in state.players["generator"].bare.parameters()} == {expected}


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
def test_running_means_do_not_depend_on_the_loss_scale(reduction):
    overrides = ["game.penalties={lecam={strength=0.3}}", f"run.reduction={reduction}"]
    (_, expected), (_, found) = (
        train([*overrides, f"precision.dtype={dtype}"]) for dtype in ("float32", "float16")
    )
    assert found.scaler.scale > 1
    for tag, mean in expected.game.averages.items():
        torch.testing.assert_close(found.game.averages[tag], mean, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_one_stage_in_bfloat16_equals_simultaneous(rule):
    overrides = ["precision.dtype=bfloat16", R1]
    reference = train([*overrides, "game.update_rule=simultaneous"])
    if rule != "alternating":
        _, state = train([*overrides, f"game.update_rule={rule}"])
        assert distance(state, reference) < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_channels_last_changes_only_the_layout(rule):
    overrides = [f"game.update_rule={rule}", R1]
    reference = train(overrides)
    norms, state = train([*overrides, "precision.channels_last=true"])
    assert norms == pytest.approx(reference[0], rel=1e-3)
    assert distance(state, reference) < 1e-2
    weight = state.players["discriminator"].bare.start.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
def test_channels_last_gives_equal_steps_for_each_reduction_and_second_order_rules(reduction):
    overrides = [
        "game.update_rule=consensus",
        "game.rule_options={strength=0.1}",
        "precision.dtype=float64",
        f"run.reduction={reduction}",
    ]
    reference = train(overrides)
    _, state = train([*overrides, "precision.channels_last=true"])
    assert distance(state, reference) < 1e-9


def compiled(comm, overrides):
    overrides = [*overrides, 'precision.compile=["generator", "discriminator"]']
    return weights(train(overrides, steps=2, comm=comm, shape=(2,))[1])


@pytest.mark.parametrize("rule", ["alternating", pytest.param("one_stage", marks=pytest.mark.slow)])
def test_compiled_networks_compute_the_same(rule):
    """In its own process, since the compiler keeps a pool of subprocesses."""
    overrides = [f"game.update_rule={rule}", *SMALL_TO_COMPILE]
    reference = weights(train(overrides, steps=2, shape=(2,))[1])
    (found,) = spawn(1, compiled, overrides, timeout_s=300)
    for name, mine in found.items():
        torch.testing.assert_close(mine, reference[name], rtol=0, atol=1e-5)


def compressed(comm):
    return weights(train(["precision.reduce_dtype=bfloat16"], comm=comm)[1])


def test_compressed_gradients_are_identical_on_every_rank_and_close_to_uncompressed():
    first, second = spawn(2, compressed)
    reference = weights(train([])[1])
    start = weights(train([], steps=0)[1])
    for name, mine in first.items():
        assert torch.equal(mine, second[name])
        moved = (reference[name] - start[name]).norm()
        assert 1e-6 < ((mine - reference[name]).norm() / moved).item() < 0.1


# One stage where the ratio exceeds the range of its dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_stage_falls_back_once_when_the_discriminator_saturates(dtype):
    sure = {"float32": -60.0, "float64": -400.0}[dtype]
    found = {}
    for rule in ("simultaneous", "one_stage"):
        overrides = [*BASE, f"game.update_rule={rule}", f"precision.dtype={dtype}"]
        config = load_config("digits", overrides)
        state = TrainState(config, LocalCommunicator(CPU), SHAPE, 0)
        with torch.no_grad():
            state.players["discriminator"].bare.finish.bias.fill_(sure)
        the_rule = state.rule(config)
        for step in range(2):
            real = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(step))
            batch = Batch(real.to(DTYPES[dtype]), None, torch.arange(BATCH), step, BATCH)
            train_step(state, the_rule, batch, config, Statistics(CPU), PhaseTimer(CPU))
        assert int(state.guard.tensors["nonfinite"]) == 0
        found[rule] = weights(state)
        notes = the_rule.notes
    assert len(notes) == 1
    assert "one_stage" in notes[0]
    assert "simultaneous" in notes[0]
    for name, mine in found["one_stage"].items():
        assert torch.equal(mine, found["simultaneous"][name])


# Loss scale of float16


def test_loss_scale_halves_at_each_overflow_and_doubles_after_many_good_steps():
    scaler = LossScaler(CPU)
    yes, no = torch.tensor(True), torch.tensor(False)
    for _ in range(3):
        scaler.update(no)
    assert scaler.scale.item() == LossScaler.INITIAL / 8
    for _ in range(LossScaler.GROWTH_STEPS - 1):
        scaler.update(yes)
    assert scaler.scale.item() == LossScaler.INITIAL / 8
    scaler.update(yes)
    assert scaler.scale.item() == LossScaler.INITIAL / 4
    for _ in range(40):
        scaler.update(no)
    assert scaler.scale.item() == 1.0
    assert not scaler.may_overflow


def test_overflow_that_a_smaller_scale_may_fix_is_not_counted():
    from gatdist.config import HealthConfig

    guard = Guard(HealthConfig(), ("generator",), CPU)
    infinite = {"generator": torch.tensor(float("inf"))}
    assert guard(infinite, excused=torch.tensor(True)).item() == 0
    assert guard.tensors["nonfinite"].item() == 0
    assert guard(infinite, excused=torch.tensor(False)).item() == 0
    assert guard.tensors["nonfinite"].item() == 1


def test_float16_finds_its_scale_before_the_first_optimizer_step():
    norms, state = train(["precision.dtype=float16", R1], steps=8)
    assert int(state.guard.tensors["nonfinite"]) == 0
    assert state.scaler.scale.item() <= LossScaler.INITIAL
    assert all(n < 1e4 for n in norms[-2:])


# Spikes


def test_spike_is_skipped_once_the_usual_norm_is_known():
    from gatdist.config import HealthConfig

    guard = Guard(HealthConfig(spike="skip", spike_factor=10.0), ("generator",), CPU)
    for value in [1.0, 500.0] + [1.0] * 150:  # norms of early steps vary widely
        assert guard({"generator": torch.tensor(value)}).item() == 1
    mean = guard.tensors["norm/generator"].item()
    assert guard({"generator": torch.tensor(9.0 * mean)}).item() == 1
    assert guard({"generator": torch.tensor(50.0 * mean)}).item() == 0
    assert guard.tensors["spikes"].item() == 1
    assert guard({"generator": torch.tensor(float("nan"))}).item() == 0
    assert guard.tensors["spikes"].item() == 1
    assert guard.tensors["norm/generator"].isfinite()
