"""Hidden state of networks: random draws and modified buffers keep the guarantees of runs.

The same seed gives the same bytes, also after a resume; canonical runs are equal for any number of
workers; buffers are identical on every rank. Real process groups, the real step.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gatdist.common.errors import GatdistError, PluginError
from gatdist.config import load_config
from gatdist.models import register_discriminator, register_generator
from gatdist.models.registry import discriminators, generators
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler
from gatdist.training.integrity import require_equal_replicas
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, refused, spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
BATCH, STEPS, SHAPE = 8, 4, (3,)
CANONICAL = ["run.reduction=canonical", "run.virtual_workers=4"]


class HiddenStateGenerator(nn.Module):
    """A generator; subclasses set ``inner``."""

    def __init__(self, *, latent_size, sample_shape, num_classes):
        super().__init__()
        self.first, self.last = nn.Linear(latent_size, 8), nn.Linear(8, sample_shape[0])
        self.inner = self.make()

    def make(self):
        return nn.Identity()

    def forward(self, latents, labels):
        return self.last(self.inner(self.first(latents).tanh()))


class PlainDiscriminator(HiddenStateGenerator):
    """A discriminator."""

    def __init__(self, *, sample_shape, num_classes):
        super().__init__(latent_size=sample_shape[0], sample_shape=(1,), num_classes=0)

    def forward(self, samples, labels):
        return super().forward(samples, labels)[:, 0]


class Noise(nn.Module):
    """Adds random noise of torch, NumPy or Python, in evaluation, too."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, x):
        if self.source == "torch":
            return x + 0.1 * torch.randn_like(x)
        if self.source == "numpy":
            return x + 0.1 * float(np.random.normal())  # noqa: NPY002
        return x + 0.1 * random.random()


class Skips(nn.Module):
    """Stochastic depth: its layer may get no gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x if self.training and random.random() < 0.5 else x + self.layer(x)


class Sometimes(nn.Module):
    """Draws random numbers for some inputs only, which a check of a few samples may miss."""

    def forward(self, x):
        return x + torch.randn(()) * 0.01 if float(x.detach().sum()) % 0.5 < 0.1 else x


class Remembers(nn.Module):
    """Buffers of all kinds, modified by a forward pass and used by the next one only."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(8, dtype=torch.bool))
        self.register_buffer("low", torch.zeros(8, dtype=torch.bfloat16))

    def forward(self, x):
        y = x - 0.1 * self.mean.to(x.dtype)
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0).to(self.mean.dtype), 0.1)
            self.calls += 1
            self.seen |= (x.detach() > 0.5).any(0)
            self.low.copy_(x.detach()[0])
        return y


class Codebook(nn.Module):
    """Quantizes to a codebook updated by its own use (van den Oord et al. 2017)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 5).repeat(8, 1).T.clone())

    def forward(self, x):
        chosen = torch.cdist(x, self.codes).argmin(1)
        found = self.codes[chosen]
        if self.training:
            self.codes[chosen] = self.codes[chosen].lerp(x.detach(), 0.1)
        return x + (found - x).detach() * 0.1


INNER = {
    "dropout": lambda: nn.Dropout(0.4),
    "alpha dropout": lambda: nn.AlphaDropout(0.4),
    "rrelu": lambda: nn.RReLU(),
    "torch noise": lambda: Noise("torch"),
    "numpy noise": lambda: Noise("numpy"),
    "python noise": lambda: Noise("python"),
    "stochastic depth": Skips,
    "buffers": Remembers,
    "codebook": Codebook,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "all": lambda: nn.Sequential(nn.Dropout(0.3), Remembers(), Noise("torch"), Codebook()),
}
ERRATIC = {"sometimes": Sometimes}
RULES = {
    "alternating": ["game.penalties={r1={strength=1.0, every_steps=2}}"],
    "one_stage": ["game.update_rule=one_stage", "game.loss=minimax"],
    "extragradient": ["game.update_rule=extragradient"],
    "consensus": ["game.update_rule=consensus", "game.rule_options={strength=0.1}"],
    "separate": [
        "game.lazy_penalties=separate",
        "game.penalties={r1={strength=1.0, every_steps=2}, path_length={strength=0.1}}",
    ],
}


def register(inner):
    for registry, base, register_ in (
        (generators, HiddenStateGenerator, register_generator),
        (discriminators, PlainDiscriminator, register_discriminator),
    ):
        name = f"hidden {inner}"
        if name not in registry.names():
            kind = type(name, (base,), {"make": lambda self: (INNER | ERRATIC)[inner]()})
            register_(name)(kind)


def train(comm, inner, overrides=(), steps=STEPS, resume_at=None, both=True):
    """Run steps on synthetic samples; return every trained tensor by name, or the error's text."""
    register(inner)
    players = ("generator", "discriminator") if both else ("discriminator",)
    names = [f'model.{player}={{name="hidden {inner}"}}' for player in players]
    plain = [] if both else ['model.generator={name="mlp", width=8, depth=1}']
    base = [f"run.global_batch={BATCH}", "model.latent_size=4", "game.penalties={}"]
    base += ["precision.dtype=float64", *names, *plain, "evaluate.metrics=[]"]
    try:
        config = load_config("ring", [*base, *overrides])
        state = TrainState(config, comm, SHAPE, 0)
        rule = state.rule(config)
    except GatdistError as error:
        return str(error)
    statistics, timer = Statistics(comm.device), PhaseTimer(comm.device)
    mine = own_samples(config, comm)
    count = config.step_samples
    for step in range(steps):
        if step == resume_at:
            saved, seen = {n: t.clone() for n, t in state.tensors().items()}, state.samples_seen
            torch.manual_seed(17), random.seed(17), np.random.seed(17)  # noqa: NPY002
            state = TrainState(config, comm, SHAPE, 0)
            rule = state.rule(config)
            state.load(seen, saved)
        real = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(step)).double()
        positions = torch.arange(count) + count * step
        batch = Batch(real[mine], None, positions[mine], step, len(real))
        train_step(state, rule, batch, config, statistics, timer)
    require_equal_replicas(state.tensors(), comm)
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def require_same_bits(found, expected):
    assert not isinstance(found, str), found
    assert found.keys() == expected.keys()
    assert [name for name, t in expected.items() if not torch.equal(found[name], t)] == []


@pytest.mark.parametrize(
    ("inner", "reduction"),
    [("sometimes", []), *((inner, reduction) for inner in INNER for reduction in ([], CANONICAL))],
)
def test_hidden_state_same_seed_same_bytes_and_resumed_as_uninterrupted(inner, reduction):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    whole = train(LOCAL, inner, reduction)
    assert not isinstance(whole, str), whole
    torch.manual_seed(2), random.seed(2), np.random.seed(2)  # noqa: NPY002
    require_same_bits(train(LOCAL, inner, reduction), whole)
    require_same_bits(train(LOCAL, inner, reduction, resume_at=2), whole)
    other = train(LOCAL, inner, [*reduction, "run.seed=1"])
    assert any(not torch.equal(other[name], whole[name]) for name in whole)


def test_hidden_state_draws_differ_between_steps_and_parts():
    drawn = []

    class Spy(nn.Module):
        def forward(self, x):
            drawn.append(tuple(torch.rand(3).tolist()))
            return x + drawn[-1][0]

    INNER["spy"] = Spy
    try:
        train(LOCAL, "spy", CANONICAL, steps=0)
        drawn.clear()
        train(LOCAL, "spy", CANONICAL, steps=2, both=False)
    finally:
        del INNER["spy"]
    # Two steps, four parts, three streams: real, fake, generator.
    assert len(set(drawn)) >= 2 * 4 * 3


def train_all(comm, cases):
    return [train(comm, inner, overrides) for inner, overrides in cases]


CASES = [(inner, []) for inner in INNER]
CASES += [("all", overrides) for overrides in RULES.values()]
CASES += [("spectral norm", RULES["alternating"]), ("stochastic depth", RULES["one_stage"])]


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_hidden_state_canonical_workers_train_to_the_same_bits_as_one(world_size):
    cases = [(inner, [*CANONICAL, *overrides]) for inner, overrides in CASES]
    expected = train_all(LOCAL, cases)
    for results in spawn(world_size, train_all, cases, timeout_s=280):
        for mine, alone in zip(results, expected, strict=True):
            require_same_bits(mine, alone)


@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_hidden_state_fast_workers_hold_the_same_state_and_repeat_it(world_size):
    """``train`` compares all workers' tensors bit for bit."""
    more = [f"run.global_batch={2 * world_size}"]
    cases = [(inner, [*more, *overrides]) for inner, overrides in CASES]
    runs = [spawn(world_size, train_all, cases, timeout_s=140) for _ in range(2)]
    for first, again in zip(*runs, strict=True):
        for one, other in zip(first, again, strict=True):
            require_same_bits(other, one)


@pytest.mark.parametrize("inner", ["spectral norm", "buffers"])
def test_hidden_state_fast_workers_and_micro_batches_equal_one_worker_within_rounding(inner):
    """Holds where buffer updates are linear in the samples."""
    whole = train(LOCAL, inner)
    parts = train(
        LOCAL, inner, [f"optim.{p}.micro_batch=2" for p in ("generator", "discriminator")]
    )
    workers, *_ = spawn(3, train, inner)
    for found in (parts, workers):
        for name, tensor in whole.items():
            if not any(word in name for word in ("low", "seen")):  # of one sample, whichever it is
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_hidden_state_of_skipped_step_is_restored():
    register("buffers")

    def trained(spoil):
        config = load_config(
            "ring",
            [
                *('model.discriminator={name="hidden buffers"}', "evaluate.metrics=[]"),
                *(f"run.global_batch={BATCH}", "game.penalties={}"),
            ],
        )
        state = TrainState(config, LOCAL, (2,), 0)
        rule = state.rule(config)
        real = torch.rand(BATCH, 2, generator=torch.Generator().manual_seed(0))
        if spoil:
            real[3] = torch.nan
        batch = Batch(real, None, torch.arange(BATCH), 0, BATCH)
        train_step(state, rule, batch, config, Statistics(LOCAL.device), PhaseTimer(LOCAL.device))
        return state.players["discriminator"].bare.inner

    assert trained(spoil=False).mean.any()
    spoiled = trained(spoil=True)
    assert spoiled.mean.isfinite().all()


@pytest.mark.parametrize("inner", ["torch noise", "numpy noise", "python noise", "all"])
def test_hidden_state_samples_in_evaluation_depend_on_their_number_only(inner):
    register(inner)
    network = generators[f"hidden {inner}"](latent_size=4, sample_shape=SHAPE, num_classes=0).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def samples(numbers):
        return Sampler(network, 4, 0, 0, "x")(torch.tensor(numbers))

    torch.manual_seed(5)
    several = samples([3, 1, 4, 5])
    random.random(), torch.rand(1)
    assert torch.equal(several[2:3], samples([4]))
    assert torch.equal(several.flip(0), samples([5, 4, 1, 3]))
    assert not torch.equal(several[0], several[1])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


class Counts(nn.Module):
    """Anneals noise by a plain Python counter."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (1 + 1 / (10 + self.calls))


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.draws = random.Random(3)

    def forward(self, x):
        return x + self.draws.random() if self.training else x


class Clock(nn.Module):
    """Draws random numbers that gatdist can't intercept."""

    def forward(self, x):
        return x + float(np.random.default_rng().normal()) if self.training else x


class Previous(nn.Module):
    """Reads the previous input."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = x if self.last is None or not self.training else x - self.last
        self.last = x.detach().mean(0)
        return y


class Caches(nn.Module):
    """Stores its input for inspection, which is no hidden state."""

    def forward(self, x):
        self.seen = x.detach()
        return x


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (Counts, "'inner.calls'"),
        (OwnGenerator, "'inner.draws'"),
        (Clock, ""),
        (Previous, ""),
    ],
)
def test_hidden_state_that_cannot_be_saved_is_rejected_by_canonical_and_warned_of_by_fast(
    inner, named
):
    INNER[inner.__name__] = inner
    try:
        register(inner.__name__)
        settings = [
            "evaluate.metrics=[]",
            f'model.discriminator={{name="hidden {inner.__name__}"}}',
        ]
        config = load_config("ring", [*settings, "run.reduction=canonical"])
        with refused(PluginError, "model.discriminator.name") as caught:
            TrainState(config, LOCAL, (2,), 0)
        assert named in str(caught.value)
        warnings = TrainState(load_config("ring", settings), LOCAL, (2,), 0).warnings
        assert any(named in warning for warning in warnings)
    finally:
        del INNER[inner.__name__]


def test_stateless_network_has_no_hidden_state():
    INNER["caches"] = Caches
    try:
        register("caches")
        settings = ["evaluate.metrics=[]", 'model.discriminator={name="hidden caches"}']
        for more in ([], ["run.reduction=canonical"]):
            state = TrainState(load_config("ring", [*settings, *more]), LOCAL, (2,), 0)
            assert state.warnings == []
    finally:
        del INNER["caches"]


class Routes(nn.Module):
    """A layer that some inputs bypass: its gradient counts as zero."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


INNER["unused"] = Routes


def test_unused_parameters_have_zero_gradient_for_any_number_of_workers():
    """Only weight decay changes them, on one worker as on several."""
    decay = [f"optim.{p}.weight_decay=0.1" for p in ("generator", "discriminator")]
    cases = [
        ("unused", [*decay, *reduction, *rule])
        for reduction in ([], CANONICAL)
        for rule in RULES.values()
    ]
    alone = train_all(LOCAL, cases)
    for workers in (2, 3):
        for results in spawn(workers, train_all, cases):
            for mine, expected, (_, overrides) in zip(results, alone, cases, strict=True):
                if CANONICAL[0] in overrides:
                    require_same_bits(mine, expected)
                for name, tensor in expected.items():
                    torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
                    if "unused" in name:  # zero gradients are exact
                        assert torch.equal(mine[name], tensor), name


class Late(nn.Module):
    """Bypasses a layer after several calls, so that the startup check can't see it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        CALLS.append(1)
        return x + 0.1 * self.layer(x) if len(CALLS) < 60 else x


CALLS = []
ERRATIC["late"] = Late


def train_late(comm, may_skip):
    HiddenStateGenerator.may_skip_parameters = may_skip
    try:
        return train(comm, "late", steps=20)
    except PluginError as error:
        return str(error)


def test_parameters_unused_from_some_step_on_are_named_or_have_zero_gradient():
    assert all("may_skip_parameters" in found for found in spawn(2, train_late, False))
    for found in spawn(2, train_late, True):
        assert not isinstance(found, str), found
