"""The result does not depend on the number of workers: real process groups, the real step."""

import itertools

import pytest
import torch

from gatdist.config import load_config
from gatdist.game import update_rules
from gatdist.game.losses import losses
from gatdist.models import DTYPES
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.nn import derivatives_of_gpus
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints
from gatdist.storage import Store
from gatdist.training.loop import run
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import own_samples, spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
SHAPE, CLASSES, BATCH, STEPS = (1, 6, 9), 3, 24, 3
SMALL = [
    "run.total_samples=600",
    f"run.global_batch={BATCH}",
    "run.checkpoint_every_samples=100000",
    "precision.dtype=float64",
    "model.latent_size=6",
    "model.conditional=true",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "game.penalties={r1={strength=1.0, every_steps=2}, r2={strength=1.0, every_steps=2}}",
    # Where a derivative is 0 except for rounding (a critic's last bias), Adam would make ±1 of it.
    "optim.generator.eps=1e-3",
    "optim.discriminator.eps=1e-3",
    "evaluate.metrics=[]",
    "evaluate.every_samples=0",
    "monitor.tensorboard=false",
]
SHARED = 20  # a batch that 3 and 7 workers share unevenly
UNEVEN = [f"run.global_batch={SHARED}"]
# Rules that solve for the whole step, and how exactly two of them solve for it.
PLAIN = ["optim.generator.name=sgd", "optim.discriminator.name=sgd"]
RULES = {
    "alternating": [],
    "simultaneous": [],
    "one_stage": [],
    "extragradient": [],
    "optimistic": [],
    "consensus": ["game.rule_options={strength=0.1}"],
    "competitive": ["game.rule_options={tolerance=1e-14}", *PLAIN],
    "conjugate": PLAIN,
}
# Solving a system, or dividing by a difference of gradients, amplifies rounding errors.
TOLERANCE = {"competitive": 1e-9, "conjugate": 1e-9}


def fits(rule, loss):
    return not (
        (rule == "one_stage" and losses[loss].ratio is None)
        or (rule == "competitive" and not losses[loss].zero_sum)
    )


def train_steps(comm, overrides, steps=STEPS, shape=SHAPE):
    """Run a few steps on synthetic data.

    Returns:
        Every gradient before a player's optimizer step, and the trained state, by name.
    """
    config = load_config("digits", SMALL + overrides)
    state = TrainState(config, comm, shape, CLASSES)
    with torch.no_grad():  # no zeros, so that every path has a gradient
        for player in state.players.values():
            for i, p in enumerate(player.bare.parameters()):
                generator = torch.Generator().manual_seed(i)
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    rule = state.rule(config)
    gradients = []
    for player in state.players.values():

        def norm(unscale=None, player=player, original=player.gradient_norm):
            found = original(unscale)
            gradients.append(torch.cat([p.grad.flatten() for p in player.parameters.values()]))
            return found

        player.gradient_norm = norm
    count = config.step_samples
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        dtype = DTYPES[config.precision.dtype]
        real = torch.randn(count, *shape, generator=generator, dtype=dtype)
        positions = torch.arange(count) + count * step
        mine = own_samples(config, comm)
        batch = Batch(real[mine], positions[mine] % CLASSES, positions[mine], step, count)
        train_step(state, rule, batch, config, Statistics(comm.device), PhaseTimer(comm.device))
    return gradients, {name: t.clone() for name, t in state.tensors().items()}


def train_all(comm, cases):
    """Run several cases in one process group."""
    return [train_steps(comm, overrides) for overrides in cases]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def require_equal(found, expected, tolerance):
    """Assert equal gradients within ``tolerance``, and equal state within a bit more."""
    assert len(found[0]) == len(expected[0]) > 0
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert theirs.norm() > 1e-6
        assert relative(mine, theirs) < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(
            found[1][name],
            tensor,
            rtol=max(1e-12, tolerance),  # a diverging critic's squares are in the thousands
            atol=max(1e-9, 1e3 * tolerance),
            msg=lambda m, n=name: f"{n}: {m}",
        )


LOSSES = losses.names()  # evaluated now, before another test registers more
GRID = [(rule, loss) for rule, loss in itertools.product(RULES, LOSSES) if fits(rule, loss)]
# Each rule with one loss, and each loss with one rule.
SAMPLE = [
    (rule, {"competitive": "minimax", "consensus": "wasserstein"}.get(rule, "relativistic"))
    for rule in RULES
] + [("alternating", loss) for loss in ("hinge", "least_squares", "minimax", "nonsaturating")]


def overrides_of(rule, loss, micro_batch=None):
    found = [f"game.update_rule={rule}", f"game.loss={loss}", *RULES[rule], *UNEVEN]
    if micro_batch:
        found += [f"optim.{p}.micro_batch={micro_batch}" for p in ("generator", "discriminator")]
    return found


def test_grid_contains_every_rule_and_loss():
    assert set(RULES) == set(update_rules.names())
    assert {rule for rule, _ in SAMPLE} == set(RULES)
    assert {loss for _, loss in SAMPLE} == set(LOSSES)


def compare_on(world_size, cases):
    """Compare ``world_size`` workers, with whole batches and two micro-batches, with one worker."""
    size = -(-SHARED // world_size) // 2
    spawned = [overrides_of(*case, m) for case in cases for m in (None, size)]
    by_rank = spawn(world_size, train_all, spawned, timeout_s=500)
    for i, case in enumerate(cases):
        expected = train_steps(LOCAL, overrides_of(*case))
        for results in by_rank:
            for found in results[2 * i : 2 * i + 2]:
                require_equal(found, expected, TOLERANCE.get(case[0], 1e-12))


# Networks that draw random numbers, and the shapes of their samples.
STYLES = "style_size=8, mapping_layers=2, style_mixing=0.9"
RANDOM = {
    (1, 8, 16): [
        f'model.generator={{name="stylegan2", capacity=64, max_width=8, {STYLES}}}',
        'model.discriminator={name="stylegan2", capacity=64, max_width=8}',
        "game.penalties={r1={strength=1.0}, path_length={strength=1.0, every_steps=2}}",
        "game.lazy_penalties=separate",
    ],
    (1, 64): [
        'model.generator={name="wavegan", width=4}',
        'model.discriminator={name="wavegan", width=4}',
    ],
    (5, 6): [
        'model.generator={name="text_convolutional", width=8, blocks=1, temperature=0.7}',
        'model.discriminator={name="text_convolutional", width=8, blocks=1}',
    ],
}


def train_random_networks(comm):
    return [
        train_steps(comm, overrides + UNEVEN, shape=shape) for shape, overrides in RANDOM.items()
    ]


def test_noise_of_networks_is_keyed_by_sample_for_any_number_of_workers():
    expected = train_random_networks(LOCAL)
    for by_case in spawn(3, train_random_networks):
        for found, alone in zip(by_case, expected, strict=True):
            require_equal(found, alone, 1e-11)


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))]
)
def test_each_rule_and_loss_gives_what_one_worker_gives(world_size):
    compare_on(world_size, SAMPLE)


def train_as_on_gpus(comm, cases):
    """Run cases with the derivatives of GPUs, where penalties do not wait for the fakes."""
    with derivatives_of_gpus():
        return train_all(comm, cases)


def test_derivatives_of_gpus_give_what_one_worker_gives():
    rules = [(rule, "relativistic") for rule in ("alternating", "simultaneous", "one_stage")]
    cases = [overrides_of(*case) for case in rules]
    cases.append(overrides_of("alternating", "relativistic", micro_batch=4))
    alone = train_all(LOCAL, cases)
    for results in spawn(2, train_as_on_gpus, cases):
        for found, expected in zip(results, alone, strict=True):
            require_equal(found, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_rules_and_losses_give_what_one_worker_gives(world_size):
    compare_on(world_size, GRID)


EXTRAS = {
    "wgan_gp": [
        "game.loss=wasserstein",
        "game.penalties={wgan_gp={strength=10.0}}",
        "game.num_discriminator_steps=2",
    ],
    "lecam": ["game.loss=hinge", "game.penalties={lecam={strength=0.3}}"],
    "path_length": ["game.penalties={path_length={strength=2.0, every_steps=2}}"],
    "path_length_in_one_stage": [
        "game.update_rule=one_stage",
        "game.penalties={path_length={strength=2.0}, r1={strength=1.0}}",
    ],
    "generator_batch_above_one": ["game.num_discriminator_steps=2", "game.generator_batch=36"],
    "generator_batch_below_one": ["game.generator_batch=12", "game.loss=relativistic"],
    "ema_and_decay_rates_scheduled": [
        "game.ema_half_life_samples={start=0, end=50, samples=48}",
        "optim.generator.betas=[0.0, {start=0.5, end=0.9, samples=48}]",
    ],
    "frozen": ['optim.discriminator.freeze=["levels.0.*"]', "optim.generator.clip_norm=0.01"],
    "separate": ["game.lazy_penalties=separate", "game.update_rule=one_stage"],
    "spectral_norm": ['model.spectral_norm=["generator", "discriminator"]'],
    "diffaugment": ['game.augmentation={name="diffaugment"}'],
    "ada": ['game.augmentation={name="ada", initial_p=0.5, adjust_samples=100, interval_steps=2}'],
    "ada_on_a_schedule": ['game.augmentation={name="ada", p={start=0.2, end=0.9, samples=48}}'],
    "generator_first": ["game.order=generator_first", "game.latents=shared"],
    "kept_fakes": ["game.latents=shared", "game.reuse_fakes=true"],
    "clipped": ["optim.generator.clip_norm=0.01", "optim.discriminator.clip_norm=0.01"],
    "atomic_and_guarded": ["health.atomic=true", "health.spike=skip"],
}


@pytest.mark.parametrize("world_size", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_penalties_augmentation_and_adaptive_state_give_what_one_worker_gives(world_size):
    cases = [overrides + UNEVEN for overrides in EXTRAS.values()]
    by_rank = spawn(world_size, train_all, cases, timeout_s=300)
    for i, overrides in enumerate(cases):
        expected = train_steps(LOCAL, overrides)
        for results in by_rank:
            require_equal(results[i], expected, 1e-11)


@pytest.mark.parametrize("reduction", ["fast", "canonical"])
def test_reused_fakes_equal_regenerated_fakes(reduction):
    overrides = ["game.latents=shared", f"run.reduction={reduction}"]
    found = train_steps(LOCAL, [*overrides, "game.reuse_fakes=true"])
    require_equal(found, train_steps(LOCAL, overrides), 1e-12)


def test_comparison_detects_a_difference():
    expected = train_steps(LOCAL, [])
    with pytest.raises(AssertionError):
        require_equal(train_steps(LOCAL, ["run.seed=1"]), expected, 1e-6)


CANONICAL = ["run.reduction=canonical", "run.virtual_workers=4", "precision.dtype=float32"]


@pytest.mark.parametrize(
    ("world_size", "virtual_workers", "every"),
    [
        (3, 4, 1),
        (4, 4, 5),
        (7, 8, 9),
        *(pytest.param(n, 4, 1, marks=pytest.mark.slow) for n in (2, 4)),
    ],
)
def test_canonical_reduction_gives_the_same_bits_as_one_worker(world_size, virtual_workers, every):
    cases = [overrides_of(*case) for case in SAMPLE] + list(EXTRAS.values())
    parts = [*CANONICAL, f"run.virtual_workers={virtual_workers}", f"run.global_batch={BATCH}"]
    cases = [overrides + parts for overrides in cases[::every]]
    expected = train_all(LOCAL, cases)
    for results in spawn(world_size, train_all, cases, timeout_s=500):
        for case, found, requested in zip(cases, results, expected, strict=True):
            for name, tensor in requested[1].items():
                assert torch.equal(found[1][name], tensor), (case, name)


def test_canonical_equals_fast_within_rounding_only():
    canonical = train_steps(LOCAL, CANONICAL[:2])
    fast = train_steps(LOCAL, [])
    require_equal(canonical, fast, 1e-12)
    assert any(not torch.equal(canonical[1][n], t) for n, t in fast[1].items())


# Whole runs


WHOLE = [
    "run.total_samples=960",
    "run.log_every_samples=240",
    "run.checkpoint_every_samples=480",
    "run.global_batch=24",
    "precision.dtype=float32",
    "game.loss=relativistic",
    'game.augmentation={name="ada", adjust_samples=2000}',
    'evaluate.metrics=["fid", "kid"]',
    "evaluate.num_samples=600",
    "evaluate.every_samples=480",
    'run.convergence={metric="fid", patience_samples=480}',
]


def train(comm, overrides, folder):
    """Run the real training loop on this worker."""
    return run(load_config("digits", SMALL + overrides), comm, Store(folder))


def newest(folder):
    return Checkpoints(Store(f"{folder}/checkpoints")).newest()


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_whole_canonical_runs_end_in_the_same_digest_and_metrics(world_size, tmp_path):
    overrides = WHOLE + CANONICAL[:2]
    alone = train(LOCAL, overrides, f"{tmp_path}/alone")
    begins = [key for key in overrides if not key.startswith(("evaluate", "run.convergence"))]
    spawn(2, train, [*begins, "run.total_samples=360"], f"{tmp_path}/workers")
    outcomes = spawn(world_size, train, overrides, f"{tmp_path}/workers")
    assert outcomes == [alone] * world_size
    digest = newest(f"{tmp_path}/alone").digest()
    assert newest(f"{tmp_path}/workers").digest() == digest
    train(LOCAL, [*overrides, "run.seed=1"], f"{tmp_path}/seed")
    assert newest(f"{tmp_path}/seed").digest() != digest


def test_whole_fast_runs_are_equal_within_rounding(tmp_path):
    overrides = ["game.update_rule=one_stage", "run.total_samples=1200"]
    train(LOCAL, overrides, f"{tmp_path}/1")
    spawn(2, train, [*overrides, "run.total_samples=600"], f"{tmp_path}/other")
    spawn(5, train, overrides, f"{tmp_path}/other")  # resumes
    expected, found = newest(f"{tmp_path}/1").tensors, newest(f"{tmp_path}/other").tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def positions_of(comm, overrides, folder):
    """Return the positions that each phase of each step of the real loop uses, by player."""
    from gatdist.game.updates.alternating import Alternating

    seen = {"discriminator": [], "generator": []}
    phases = Alternating.phases

    def recorded(self, step):
        for phase in phases(self, step):
            seen[phase.name].append(phase.batch.positions.tolist())
            yield phase

    Alternating.phases = recorded
    train(comm, overrides, folder)
    return seen


def test_each_discriminator_step_uses_its_own_global_batch(tmp_path):
    overrides = ["game.num_discriminator_steps=2", "run.total_samples=144"]
    first, second = spawn(2, positions_of, overrides, str(tmp_path))
    for mine, theirs in zip(first["discriminator"], second["discriminator"], strict=True):
        assert sorted(mine + theirs) == list(range(min(mine), min(mine) + BATCH))
    shown = [p for seen in (first, second) for batch in seen["discriminator"] for p in batch]
    assert sorted(shown) == list(range(144))
    assert first["generator"] == first["discriminator"][1::2]
    assert newest(tmp_path).state["samples_seen"] == 144


# Failures


def poison_one_rank(comm, overrides, folder):
    """Run with a discriminator loss that is NaN on worker 1 only, at the given calls."""
    from gatdist.game import Loss, register_loss

    calls = []

    def discriminator(real, fake):
        calls.append(1)
        loss = losses["nonsaturating"].discriminator(real, fake)
        return loss * float("nan") if comm.rank == 1 and len(calls) == 5 else loss

    register_loss("poisoned", Loss(discriminator, losses["nonsaturating"].generator))
    outcome = train(comm, ["game.loss=poisoned", *overrides], folder)
    return outcome["status"]


def test_nonfinite_step_on_one_worker_is_skipped_on_all(tmp_path):
    overrides = ["run.total_samples=480"]
    assert spawn(2, poison_one_rank, overrides, str(tmp_path)) == ["finished", "finished"]
    tensors = newest(tmp_path).tensors
    assert tensors["guard/nonfinite"] == 1
    assert all(t.isfinite().all() for t in tensors.values())
    assert adam_steps(tensors) == {"discriminator": {19}, "generator": {20}}


def adam_steps(tensors):
    """Return the number of optimizer steps of each player."""
    return {
        player: {
            int(t)
            for name, t in tensors.items()
            if name.startswith(f"optimizer_{player}/") and name.endswith("/step")
        }
        for player in ("discriminator", "generator")
    }


@pytest.mark.parametrize("order", ["discriminator_first", "generator_first"])
def test_atomic_step_updates_both_players_or_none(order, tmp_path):
    overrides = ["run.total_samples=480", "health.atomic=true", f"game.order={order}"]
    assert spawn(2, poison_one_rank, overrides, str(tmp_path)) == ["finished", "finished"]
    assert adam_steps(newest(tmp_path).tensors) == {"discriminator": {19}, "generator": {19}}


def test_rollback_restores_all_workers_and_continues_with_other_noise(tmp_path):
    overrides = [
        "run.total_samples=480",
        "run.log_every_samples=48",
        "run.checkpoint_every_samples=96",
        "health.nonfinite=rollback",
    ]
    assert spawn(2, poison_one_rank, overrides, str(tmp_path)) == ["finished", "finished"]
    checkpoint = newest(tmp_path)
    assert checkpoint.state["rollbacks"] == 1
    # The loss is non-finite only once, so that the second try makes every step.
    assert adam_steps(checkpoint.tensors) == {"discriminator": {20}, "generator": {20}}
    undisturbed = tmp_path / "undisturbed"
    train(LOCAL, ["game.loss=nonsaturating", *overrides], str(undisturbed))
    same = newest(undisturbed).tensors["generator/start.weight"]
    assert (checkpoint.tensors["generator/start.weight"] - same).abs().max() > 1e-6
    seen = [line["samples_seen"] for line in metrics_of(tmp_path)]
    assert seen == sorted(set(seen))


def metrics_of(folder):
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saturate_on_one_worker(comm, folder):
    """Return notes of a run in which worker 1's fake logits underflow the one-stage ratio."""
    from gatdist.game.game import Game, Scores

    discriminate = Game.discriminate

    def saturated(self, samples, batch, side, discriminator=None):
        scores = discriminate(self, samples, batch, side, discriminator)
        far = -500.0 if comm.rank == 1 and side == "fake" else 0.0
        return Scores(scores.samples, (scores.logits + far,))

    Game.discriminate = saturated
    events = []
    overrides = ["game.update_rule=one_stage", "run.total_samples=480", "run.log_every_samples=48"]
    run(
        load_config("digits", SMALL + overrides),
        comm,
        Store(folder),
        emit=lambda kind, fields: events.append((kind, fields.get("message"))),
    )
    return [message for kind, message in events if kind == "note"]


def test_fallback_on_one_worker_is_reported_once(tmp_path):
    (message, nothing) = spawn(2, saturate_on_one_worker, str(tmp_path))
    assert nothing == []
    assert len(message) == 1
    assert "simultaneous" in message[0]
    assert newest(tmp_path).tensors["guard/nonfinite"] == 0


def drift_apart(comm, folder):
    """Change worker 1's average during training."""
    from gatdist.common.errors import WorkerLostError
    from gatdist.training import player

    update = player.MovingAverage.update

    def drifting(self, network, num_samples):
        update(self, network, num_samples)
        if comm.rank == 1:
            next(iter(self.network.parameters())).data.view(-1)[0] += 1e-9

    player.MovingAverage.update = drifting
    try:
        train(comm, ["run.checkpoint_every_samples=48"], folder)
    except WorkerLostError as error:
        return str(error)


def test_drifting_replicas_stop_the_run_and_name_the_tensor(tmp_path):
    for message in spawn(2, drift_apart, str(tmp_path)):
        for fact in ("worker 1 ", "average/embedding.weight", "worker 0"):
            assert fact in message


def stop_from_one_rank(comm, folder):
    """Request a stop on worker 1 only."""
    asked = []

    def should_stop():
        asked.append(1)
        return comm.rank == 1 and len(asked) >= 7

    config = load_config("digits", [*SMALL, "run.total_samples=60000"])
    return run(config, comm, Store(folder), should_stop=should_stop)


def test_stop_request_on_one_worker_stops_all_after_the_same_step_with_a_checkpoint(tmp_path):
    first, second = spawn(2, stop_from_one_rank, str(tmp_path))
    assert first == second
    assert first["status"] == "interrupted"
    assert newest(tmp_path).state["samples_seen"] == first["samples_seen"]


def all_operations(comm):
    tensor = torch.arange(3.0) + comm.rank
    return {
        "sum": comm.all_reduce_(tensor.clone()).tolist(),
        "gathered": comm.all_gather(tensor).tolist(),
        "first": comm.broadcast_(tensor.clone()).tolist(),
        "object": comm.broadcast_object({"from": comm.rank, "text": "ψ" * 1000}),
        "any": (comm.any(comm.rank == 1), comm.any(False)),
        "objects": comm.all_gather_object(["é" * comm.rank, comm.rank]),
    }


def test_torch_communicator_operations():
    first, second = spawn(2, all_operations)
    assert first == second
    assert first["sum"] == [1.0, 3.0, 5.0]
    assert first["gathered"] == [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]
    assert first["first"] == [0.0, 1.0, 2.0]
    assert first["object"] == {"from": 0, "text": "ψ" * 1000}
    assert first["any"] == (True, False)
    assert first["objects"] == [["", 0], ["é", 1]]
