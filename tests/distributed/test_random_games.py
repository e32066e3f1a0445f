"""Random games: a combination is rejected by name, or trains identically on any number of workers.

Other tests choose their combinations. Here losses, rules, penalties, augmentations, optimizers and
networks are combined at random, each from the seed in the test's name.
"""

import random

import pytest
import torch

from gatdist.common.errors import GatdistError
from gatdist.config import load_config
from gatdist.game import update_rules
from gatdist.game.losses import losses
from gatdist.game.penalties import penalties
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.graphs import StepGraphs
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, spawn
from tape import Tape

LOCAL = LocalCommunicator(torch.device("cpu"))
BATCH, CLASSES, STEPS, STEPS_RECORDED, VIRTUAL_WORKERS = 8, 3, 4, 18, 4
BOTH = ("generator", "discriminator")
# Names, evaluated before another test registers its own.
LOSSES, PENALTIES, RULES = sorted(losses.names()), sorted(penalties.names()), update_rules.names()
FAMILIES = {  # the shape of a sample, the network and its options
    "residual": ((1, 8, 10), "residual", "width=4"),
    "points": ((2,), "mlp", "width=6, depth=1"),
    "dcgan": ((3, 16, 16), "dcgan", "width=2"),
    "sngan": ((3, 16, 16), "sngan", "width=4"),
    "r3gan": ((3, 16, 16), "r3gan", "width=8, max_width=8, group_width=4, blocks=1"),
    "stylegan2": ((3, 16, 16), "stylegan2", "capacity=64, max_width=8"),
    "wavegan": ((1, 1024), "wavegan", "width=2"),
    "text": ((9, 8), "text_convolutional", "width=8, blocks=1"),
}
MICRO_BATCHES = [f"optim.{player}.micro_batch=3" for player in BOTH]
CANONICAL = ["run.reduction=canonical", f"run.virtual_workers={VIRTUAL_WORKERS}"]
GAMES = [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 200))]
# Solving a system, or dividing by a difference of gradients, amplifies rounding errors.
TOLERANCE = 1e-6


def random_game(seed):
    """Return a name of :data:`FAMILIES`, and overrides of a mostly valid game."""
    draw = random.Random(seed)
    family, rule = draw.choice(list(FAMILIES)), draw.choice([*RULES, "alternating", "one_stage"])
    zero_sum = [name for name in LOSSES if losses[name].zero_sum]
    loss = draw.choice(zero_sum if rule == "competitive" else LOSSES)
    found = [f"game.update_rule={rule}", f"game.loss={loss}"]
    options = {"competitive": "tolerance=1e-13, max_iterations=100", "consensus": "strength=0.1"}
    found += [f"game.rule_options={{{options.get(rule, '')}}}"]
    if rule == "alternating":
        found += draw.choice([[], ["game.order=generator_first"], ["game.reuse_fakes=true"]])
        more = [["game.num_discriminator_steps=2"], ["game.generator_batch=4"]]
        found += draw.choice([[], *more, [*more[0], "game.generator_batch=16"]])
    found += [f"game.latents={draw.choice(['fresh', 'shared'])}"]
    chosen = []
    for name in draw.sample(PENALTIES, draw.randrange(3)):
        strength = draw.choice(["0.25", "{start=0.25, end=0.0625, samples=24}"])
        chosen.append(f"{name}={{strength={strength}, every_steps={draw.randint(1, 3)}}}")
    found += [f"game.penalties={{{', '.join(chosen)}}}"]
    found += draw.choice([[], ["game.lazy_penalties=separate"]])
    if len(FAMILIES[family][0]) == 3:
        kinds = ['{name="diffaugment"}', '{name="ada", initial_p=0.5, interval_steps=2}']
        found += draw.choice([[], *([f"game.augmentation={kind}"] for kind in kinds)])
    found += _optimizers(draw, plain=rule in ("competitive", "conjugate"))
    found += draw.choice([[], ['model.spectral_norm=["discriminator"]']])
    found += [f"model.conditional={draw.choice(['true', 'false'])}"]
    found += draw.choice([[], ["precision.channels_last=true"]])
    found += draw.choice([[], ["health.atomic=true"], ["health.spike=skip"]])
    return family, found


def _optimizers(draw, plain):
    sgd = plain or draw.random() < 0.3
    found = []
    for player in BOTH:
        rate = 2.0**-7 if sgd else 2.0**-10
        settings = ["name=sgd" if sgd else "eps=1e-3", f"learning_rate={rate}"]
        warmup = f"learning_rate={{start={rate}, warmup=16}}"
        more = ["clip_norm=0.5", "weight_decay=0.01", warmup, "direction=optimistic"]
        if not plain and sgd:
            more += ["momentum=0.5", "direction=conjugate", "conjugate_beta=HS-DY"]
        settings += draw.sample(more, draw.randrange(3))
        found += [f"optim.{player}.{setting}" for setting in settings]
    return found


def train(comm, family, overrides, steps=STEPS, resume_at=None, recorder=None):
    """Run steps on synthetic samples; return every trained tensor by name, or the error's text."""
    shape, network, options = FAMILIES[family]
    sizes = [f'model.{player}={{name="{network}", {options}}}' for player in BOTH]
    base = [f"run.global_batch={BATCH}", "model.latent_size=8", "precision.dtype=float64", *sizes]
    base += ["run.total_samples=100000", "game.ema_half_life_samples=50"]
    try:
        config = load_config("digits", base + overrides)
        config.check_workers(comm.world_size)
        classes = CLASSES if config.model.conditional else 0
        state = TrainState(config, comm, shape, classes, recorder=recorder)
        rule = state.rule(config)
    except GatdistError as error:
        return str(error)
    _randomize(state)
    play = StepGraphs(recorder) if recorder else None
    statistics, timer = Statistics(comm.device), PhaseTimer(comm.device)
    count, mine = config.step_samples, own_samples(config, comm)
    for step in range(steps):
        if step == resume_at:
            saved, seen = {n: t.clone() for n, t in state.tensors().items()}, state.samples_seen
            state = TrainState(config, comm, shape, classes)
            rule = state.rule(config)
            state.load(seen, saved)
        real = _samples(family, count, step).to(DTYPES[config.precision.dtype])
        if config.precision.channels_last and real.dim() == 4:
            real = real.contiguous(memory_format=torch.channels_last)
        positions = torch.arange(count) + count * step
        labels = positions[mine] % CLASSES if classes else None
        batch = Batch(real[mine], labels, positions[mine], step, count)
        train_step(state, rule, batch, config, statistics, timer, play)
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def _randomize(state):
    """Replace zeros, so that every path has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for player in state.players.values():
            for p in player.bare.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    state.average.start(state.players["generator"].bare)


def _samples(family, count, step):
    generator = torch.Generator().manual_seed(step)
    shape = FAMILIES[family][0]
    if family == "text":
        tokens = torch.randint(0, shape[0], (count, shape[1]), generator=generator)
        return torch.nn.functional.one_hot(tokens, shape[0]).movedim(2, 1)
    return torch.rand(count, *shape, generator=generator) * 2 - 1


def require_near(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        apart = (found[name].double() - tensor.double()).norm()
        assert apart <= TOLERANCE * (1e-3 + tensor.double().norm()), name


def require_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


def is_refusal(found):
    return isinstance(found, str)


@pytest.mark.parametrize("seed", GAMES)
def test_game_is_rejected_by_name_or_trains_identically_in_parts_and_from_a_checkpoint(seed):
    family, overrides = random_game(seed)
    whole = train(LOCAL, family, overrides)
    if is_refusal(whole):
        return
    assert all(tensor.double().isfinite().all() for tensor in whole.values())
    require_same_bits(train(LOCAL, family, overrides, resume_at=2), whole)
    for in_parts in (MICRO_BATCHES, CANONICAL):
        found = train(LOCAL, family, overrides + in_parts)
        if not is_refusal(found):
            require_near(found, whole)


@pytest.mark.parametrize("seed", GAMES)
def test_replayed_steps_equal_eager_steps(seed, monkeypatch):
    monkeypatch.setattr(draws, "is_readable", lambda tensor: False)  # as on a device
    family, overrides = random_game(seed)
    game = family, [*overrides, "precision.cuda_graphs=true"]
    played, tape = train(LOCAL, *game, STEPS_RECORDED), Tape()
    if not is_refusal(played):
        require_near(train(LOCAL, *game, STEPS_RECORDED, recorder=tape), played)
        assert tape.replayed > 0


def train_all(comm, games):
    """Train all games, one after another, in one process group."""
    return [train(comm, *game) for game in games]


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 7))]
)
@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 60), marks=pytest.mark.slow)])
def test_workers_train_a_game_as_one_worker_does_and_canonically_to_the_same_bits(
    world_size, seeds
):
    games = [random_game(seed) for seed in seeds]
    canonical = [(family, overrides + CANONICAL) for family, overrides in games]
    equal = [require_near] * len(games) + [require_same_bits] * len(canonical)
    expected = train_all(LOCAL, games + canonical)
    assert sum(not is_refusal(found) for found in expected) > len(games)
    for results in spawn(world_size, train_all, games + canonical, timeout_s=500):
        for mine, alone, require in zip(results, expected, equal, strict=True):
            if is_refusal(mine):
                assert is_refusal(alone) or "worker" in mine, mine
            else:
                require(mine, alone)
