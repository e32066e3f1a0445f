"""Replayed steps equal eager steps."""

import pytest
import torch

import conditional_games
from conditional_games import SMALL, TRANSLATION, VOCODER
from gatdist.common.errors import ConfigError
from gatdist.config import load_config
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel import draws
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.graphs import WARM_UP_STEPS, StepGraphs
from gatdist.training.loop import run
from gatdist.training.state import TrainState
from gatdist.training.step import train_step
from support import refused
from tape import Tape

CPU = torch.device("cpu")
N, SHAPE = 8, (1, 8, 8)
RATE = 2.0**-9  # the same number in single and double precision
STEPS = 16
BASE = [
    f"run.global_batch={N}",
    "model.latent_size=8",
    'model.generator={name="residual", width=4, max_width=8}',
    'model.discriminator={name="residual", width=4, max_width=8}',
    *(f"optim.{player}.learning_rate={RATE}" for player in ("generator", "discriminator")),
    "precision.cuda_graphs=true",
]


@pytest.fixture(autouse=True)
def unreadable_tensors(monkeypatch):
    """As on a device: the host can't read values."""
    monkeypatch.setattr(draws, "is_readable", lambda tensor: False)


def start(settings, recorder=None):
    config = load_config("digits", BASE + settings)
    state = TrainState(config, LocalCommunicator(CPU), SHAPE, 10, recorder=recorder)
    return config, state


def batch_at(config, step, noise=0):
    generator = torch.Generator().manual_seed(step)
    n = config.step_samples
    real = torch.randn(n, *SHAPE, generator=generator)
    if config.precision.dtype == "float64":
        real = real.double()
    if config.precision.channels_last:
        real = real.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (n,), generator=generator) if config.model.conditional else None
    return Batch(real, labels, torch.arange(n) + n * step, step, n, noise)


def train(settings, recorder=None, steps=STEPS, noise=lambda step: 0, spoil=None):
    """Return the state after some steps, and means of the logged values."""
    config, state = start(settings, recorder)
    rule = state.rule(config)
    play = StepGraphs(recorder) if recorder else None
    statistics, timer = Statistics(CPU), PhaseTimer(CPU)
    for step in range(steps):
        batch = batch_at(config, step, noise(step))
        if step == spoil:
            batch.real[0] = torch.nan
        train_step(state, rule, batch, config, statistics, timer, play)
    learned = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return learned, statistics.reduce(LocalCommunicator(CPU))


SETTINGS = [
    *(
        [f"game.update_rule={rule}", "precision.dtype=float64"]
        for rule in (
            "alternating",
            "simultaneous",
            "one_stage",
            "extragradient",
            "optimistic",
            "consensus",
        )
    ),
    [
        "game.update_rule=conjugate",
        *(f"optim.{player}.name=sgd" for player in ("generator", "discriminator")),
    ],
    ["game.latents=shared", "game.reuse_fakes=true", "precision.channels_last=true"],
    ["game.num_discriminator_steps=2", "health.atomic=true"],
    ["precision.dtype=bfloat16"],
    ["precision.dtype=float16"],
    ['game.augmentation={name="ada", initial_p=0.5, adjust_samples=500}'],
    ['game.augmentation={name="diffaugment"}'],
    ['model.spectral_norm=["discriminator"]', "health.spike=skip"],
    ["game.penalties={lecam={strength=1.0}, path_length={strength=1.0}, wgan_gp={strength=1.0}}"],
    ["game.lazy_penalties=separate"],
    ["run.reduction=canonical"],
    ["optim.generator.micro_batch=4", "optim.generator.clip_norm=1.0"],
    ["model.conditional=true"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings[0])
def test_replayed_steps_equal_eager_steps(settings):
    there, seen_there = train(settings)
    tape = Tape()
    here, seen_here = train(settings, tape)
    assert tape.replayed >= STEPS - tape.warmed_up > 0
    assert here.keys() == there.keys()
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=0, msg=name)
    assert seen_here == seen_there


def test_changing_values_are_inputs_of_a_recording():
    """Learning rates and decaying penalty weights are numbers on the device."""
    settings = [
        *(
            f"optim.{player}.learning_rate={{start={RATE}, warmup={N * STEPS}}}"
            for player in ("generator", "discriminator")
        ),
        "game.penalties={r1={strength={start=2.0, end=0.2, samples=100}}}",
        "game.ema_half_life_samples={start=0, end=50, samples=100}",
        'game.augmentation={name="ada", p={start=0, end=0.8, samples=100}, policy=["color"]}',
    ]
    (there, seen_there), (here, seen_here) = train(settings), train(settings, tape := Tape())
    assert tape.recorded == 1
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-6, msg=name)
    assert seen_here == pytest.approx(seen_there, rel=1e-4)


@pytest.mark.parametrize("game", [TRANSLATION, VOCODER])
def test_fields_and_weights_of_terms_are_inputs_of_a_recording(game):
    term = "l1" if game is TRANSLATION else "log_mel"
    settings = [
        *game,
        f"game.terms.{term}.weight={{start=9.0, end=1.0, samples=80}}",
        "game.terms.features.start_samples=60",
        "game.adversarial_weight={start=0.5, end=1.0, samples=90}",
        "precision.cuda_graphs=true",
    ]
    config = load_config("digits", [*SMALL, *settings])
    comm, steps = LocalCommunicator(CPU), WARM_UP_STEPS + 6
    tape = Tape()
    replayed = conditional_games.train(comm, config, steps, tape)
    eager = conditional_games.train(comm, config, steps)
    assert replayed.keys() == eager.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(replayed[name], tensor, rtol=1e-4, atol=1e-6)


def test_each_set_of_penalties_is_recorded_once():
    penalties = (
        "game.penalties={r1={strength=1.0, every_steps=2}, r2={strength=1.0, every_steps=4}}"
    )
    train([penalties], tape := Tape(), steps=32)
    assert tape.recorded == 3  # none, r1, both
    assert tape.warmed_up == 3 * WARM_UP_STEPS


def test_other_noise_is_recorded_anew():
    """As after a rollback: names of noise streams are part of a recording."""
    plain = ["game.penalties={}"]
    (there, _), (here, _) = (
        train(plain, recorder, noise=lambda step: int(step >= 8)) for recorder in (None, Tape())
    )
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=0, msg=name)
    same, _ = train(plain, noise=lambda step: 0)
    assert any(not torch.equal(same[name], there[name]) for name in there)


def test_nonfinite_step_changes_no_weights():
    """The guard is evaluated within the recording."""
    (there, _), (here, _) = (train([], recorder, spoil=13) for recorder in (None, Tape()))
    assert here["guard/nonfinite"] > 0
    for name in there:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=0, msg=name)


def test_one_stage_falls_back_at_the_next_log():
    """A fake whose gradient underflows makes steps non-finite until the next log, and no longer."""
    config, state = start(["game.update_rule=one_stage", "game.loss=nonsaturating"], tape := Tape())
    rule, play = state.rule(config), StepGraphs(tape)
    bias = [p for p in state.players["discriminator"].parameters.values() if p.dim() == 1][-1]
    counts = []
    for step in range(24):
        if step == 10:
            with torch.no_grad():
                bias.fill_(-200.0)
        train_step(
            state, rule, batch_at(config, step), config, Statistics(CPU), PhaseTimer(CPU), play
        )
        if step % 4 == 3:
            rule.reconsider()
            counts.append(int(state.guard.tensors["nonfinite"]))
    assert rule.given_up
    assert counts[2:] == [2, 2, 2, 2]
    assert tape.recorded == 2  # once for each rule


def test_what_cannot_be_recorded_is_reported():
    config, state = start(["game.penalties={}"], tape := Tape())
    rule, play = state.rule(config), StepGraphs(tape)

    def read(module, inputs, logits):
        if float(logits.detach().mean()) > 0:
            logits.detach()

    state.players["discriminator"].bare.register_forward_hook(read)

    def steps():
        for step in range(8):
            batch = batch_at(config, step)
            train_step(state, rule, batch, config, Statistics(CPU), PhaseTimer(CPU), play)

    with refused(ConfigError, "precision.cuda_graphs"):
        steps()
    assert state.samples_seen == N * WARM_UP_STEPS


def test_without_cuda_graphs_the_run_continues_with_a_note(tmp_path):
    settings = ["run.total_samples=32", "evaluate.metrics=[]", "monitor.tensorboard=false"]
    events = []
    config, _ = start(settings)
    outcome = run(
        config,
        LocalCommunicator(CPU),
        Store(str(tmp_path)),
        emit=lambda kind, fields: events.append((kind, fields.get("message", ""))),
    )
    assert outcome["status"] == "finished"
    assert any(kind == "note" and "CUDA graphs" in message for kind, message in events)


@pytest.mark.filterwarnings("ignore")  # caused by torch.compile
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["game.update_rule=competitive", "game.loss=minimax"], "precision.cuda_graphs"),
        (['precision.compile=["generator"]'], "precision.compile"),
    ],
)
def test_settings_that_cannot_be_recorded_are_rejected(settings, field):
    sgd = [f"optim.{player}.name=sgd" for player in ("generator", "discriminator")]
    config, state = start([*settings, *sgd, "game.penalties={}"])
    with refused(ConfigError, field):
        state.rule(config)
