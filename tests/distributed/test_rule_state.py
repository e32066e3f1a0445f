"""State of rules and policies is in checkpoints, and every worker takes the same decision."""

import itertools

import pytest
import torch
from torch import nn

from gatdist.config import load_config
from gatdist.game import Phase, UpdateRule, register_update_rule
from gatdist.game.game import RealSide
from gatdist.models import register_discriminator, register_generator
from gatdist.models.registry import discriminators, generators
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.inspection import digest
from gatdist.storage import Store
from gatdist.training.integrity import require_equal_replicas
from gatdist.training.loop import run
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, refused, spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
BATCH, STEPS, TICK = 8, 8, 3
SETTINGS = [
    "game.update_rule=one_stage",
    "game.loss=nonsaturating",
    "game.penalties={}",
    'model.generator={name="passes on"}',
    'model.discriminator={name="is sure"}',
    "model.latent_size=2",
    "optim.generator.learning_rate=1e-6",
    "evaluate.metrics=[]",
    "monitor.tensorboard=false",
]


class NearIdentity(nn.Module):
    """Returns samples that are nearly its latents."""

    def __init__(self, *, latent_size, sample_shape, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, latents, labels):
        return latents * self.scale


class Saturates(nn.Module):
    """Logits of samples beyond ``limit`` are so large that their gradient underflows."""

    def __init__(self, *, sample_shape, num_classes, limit: float = 100.0):
        super().__init__()
        self.limit, self.layer = limit, nn.Linear(2, 1)

    def forward(self, samples, labels):
        beyond = (samples[:, 0] > self.limit).to(samples.dtype)
        return self.layer(samples)[:, 0] - 1000 * beyond


def register():
    for registry, register_, name, kind in (
        (generators, register_generator, "passes on", NearIdentity),
        (discriminators, register_discriminator, "is sure", Saturates),
    ):
        if name not in registry.names():
            register_(name)(kind)


def rarest(num_samples):
    """Return a limit that only one of the first latents exceeds, and its position."""
    positions = torch.arange(num_samples)
    first = draws.normal(0, "latents", positions, (2,))[:, 0]
    (second, most), (_, place) = first.sort().values[-2:], first.sort().indices[-2:]
    return float((second + most) / 2), int(place)


def train(comm, limit, resume_at=None):
    """Return whether the rule fell back by each step, the unusable flag, and all tensors."""
    register()
    draws.is_readable = lambda tensor: False  # as on a device; this process belongs to the test
    config = load_config(
        "ring",
        [*SETTINGS, f"run.global_batch={BATCH}", f"model.discriminator.limit={limit}"],
    )
    state = TrainState(config, comm, (2,), 0)
    rule = state.rule(config)
    decisions = []
    mine = own_samples(config, comm)
    for step in range(STEPS):
        if step == resume_at:
            saved, seen = {n: t.clone() for n, t in state.tensors().items()}, state.samples_seen
            state = TrainState(config, comm, (2,), 0)
            rule = state.rule(config)
            state.load(seen, saved)
        positions = torch.arange(BATCH) + BATCH * step
        real = torch.rand(BATCH, 2, generator=torch.Generator().manual_seed(step))
        batch = Batch(real[mine], None, positions[mine], step, len(real))
        train_step(state, rule, batch, config, Statistics(comm.device), PhaseTimer(comm.device))
        if step % TICK == TICK - 1:
            rule.reconsider()
        require_equal_replicas(state.tensors(), comm)
        decisions.append((rule.given_up, int(rule.tensors["unusable"])))
    return decisions, {name: tensor.clone() for name, tensor in state.tensors().items()}


@pytest.fixture
def on_a_device(monkeypatch):
    monkeypatch.setattr(draws, "is_readable", draws.is_readable)  # restored afterwards


@pytest.mark.parametrize("workers", [2, 3])
def test_rule_state_of_one_worker_is_decided_by_all(workers, on_a_device):
    """One fake in 24, on one worker, makes all fall back at the same log, as one worker would."""
    limit, place = rarest(TICK * BATCH)
    decisions, alone = train(LOCAL, limit)
    seen_at = place // BATCH
    assert decisions == [(step >= TICK - 1, int(step >= seen_at)) for step in range(STEPS)]
    for decisions_there, found in spawn(workers, train, limit):
        assert decisions_there == decisions
        assert found["guard/nonfinite"] == alone["guard/nonfinite"] == 1


@pytest.mark.parametrize("resume_at", range(1, STEPS))
def test_rule_state_is_resumed_right_after_it_changed(resume_at, on_a_device):
    limit, _ = rarest(TICK * BATCH)
    decisions, whole = train(LOCAL, limit)
    decisions_there, found = train(LOCAL, limit, resume_at)
    assert decisions_there == decisions
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_rule_state_is_not_changed_by_an_interruption(tmp_path, on_a_device):
    """The rule is decided at a log: a run stopped before that log has not fallen back."""
    register()
    draws.is_readable = lambda tensor: False
    limit, _ = rarest(2 * 16)
    settings = [*SETTINGS, f"model.discriminator.limit={limit}", "run.global_batch=16"]
    settings += [
        "run.total_samples=160",
        "run.log_every_samples=80",
        "run.checkpoint_every_samples=80",
    ]
    config = load_config("ring", settings)
    stores = [Store(str(tmp_path / name)) for name in ("interrupted", "whole")]
    polls = itertools.count(1)
    outcome = run(config, LOCAL, stores[0], should_stop=lambda: next(polls) == 3)
    assert outcome["status"] == "interrupted"
    assert outcome["samples_seen"] < 80
    for store in stores:
        assert run(config, LOCAL, store)["status"] == "finished"
    assert digest(stores[0].url) == digest(stores[1].url)


def test_rule_state_nonfinite_steps_survive_an_interruption(tmp_path, monkeypatch):
    """The limit of non-finite steps since the last log includes those before the interruption."""
    register()
    limit, _ = rarest(2 * 16)
    devices_readable = draws.is_readable
    monkeypatch.setattr(draws, "is_readable", lambda tensor: False)
    settings = [*SETTINGS, f"model.discriminator.limit={limit}", "run.global_batch=16"]
    settings += [
        "run.total_samples=160",
        "run.log_every_samples=80",
        "run.checkpoint_every_samples=160",
    ]
    settings += ["health.nonfinite=rollback"]
    config = load_config("ring", settings)
    store, polls, events = Store(str(tmp_path / "run")), itertools.count(1), []
    outcome = run(config, LOCAL, store, should_stop=lambda: next(polls) == 3)
    assert outcome["status"] == "interrupted"

    def emit(kind, fields):
        events.append((kind, fields))

    run(config, LOCAL, store, emit=emit)
    # It rolled back once, at the log, and has fallen back for good.
    ticks = [fields["health/rollbacks"] for kind, fields in events if kind == "log"]
    assert ticks[0] == 0
    assert ticks[-1] == 1
    monkeypatch.setattr(draws, "is_readable", devices_readable)


class Counting(UpdateRule):
    """Every third step updates the generator only: it depends on the rule's state."""

    kept = True

    def __init__(self, game, config):
        super().__init__(game, config)
        self.count = 0
        if self.kept:
            self.tensors = {"count": torch.zeros((), dtype=torch.int64)}

    def phases(self, step):
        count = int(self.tensors["count"]) if self.kept else self.count
        if self.kept:
            self.tensors["count"] += 1
        else:
            self.count += 1
        player = "generator" if count % 3 == 2 else "discriminator"
        yield Phase(player, (player,), step.batch, self._backward)

    def _backward(self, batch):
        game = self.game
        real, fake = (
            game.discriminate(samples, batch, side)
            for samples, side in (
                (batch.real, "real"),
                (game.generate(batch)["sample"], "fake"),
            )
        )
        loss, seen = game.discriminator_loss(batch, RealSide(real), fake, penalized=fake)
        torch.autograd.backward(loss)
        return seen


@pytest.mark.parametrize("kept", [True, False])
def test_rule_state_of_a_users_rule_is_resumed_or_rejected(kept, tmp_path, monkeypatch):
    register_update_rule("counting")(type("Own", (Counting,), {"kept": kept}))
    from gatdist.common.errors import PluginError
    from gatdist.training.plan import check

    settings = ["game.update_rule=counting", "game.penalties={}", "evaluate.metrics=[]"]
    settings += ["run.global_batch=16", "monitor.tensorboard=false", "run.total_samples=160"]
    config = load_config("ring", settings)
    if not kept:
        (warning,) = check(config, str(tmp_path / "x")).warnings
        assert "'count'" in warning
        with refused(PluginError, "game.update_rule"):
            check(load_config("ring", [*settings, "run.reduction=canonical"]), str(tmp_path / "x"))
        return
    assert check(config, str(tmp_path / "x")).warnings == ()
    stores = [Store(str(tmp_path / name)) for name in ("interrupted", "whole")]
    polls = itertools.count(1)
    run(config, LOCAL, stores[0], should_stop=lambda: next(polls) == 4)
    for store in stores:
        run(config, LOCAL, store)
    assert digest(stores[0].url) == digest(stores[1].url)
