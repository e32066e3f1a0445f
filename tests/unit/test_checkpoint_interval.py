"""The interval between checkpoints, chosen from what they cost."""

import json
import math

import numpy as np
import pytest
import torch

from gatdist.bench.simulate.faults import Kind, Situation, play
from gatdist.cli import main
from gatdist.common.errors import ConfigError
from gatdist.common.reliability import young_s
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.checkpoint_interval import (
    CheckpointInterval,
    best_interval_s,
    interval_samples,
    mean_time_to_failure_s,
)
from support import refused

DAY = 86_400.0
ALONE = LocalCommunicator(torch.device("cpu"))


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.05, 3600.0), (1.0, DAY), (10.0, 7200.0)])
def test_youngs_interval_minimizes_what_is_lost(cost_s, mtbf_s):
    """Per second, C / W for checkpoints and W / 2M for steps that are lost."""
    tries = young_s(cost_s, mtbf_s) * np.geomspace(0.1, 10, 2001)
    lost = cost_s / tries + tries / (2 * mtbf_s)
    assert tries[np.argmin(lost)] == pytest.approx(young_s(cost_s, mtbf_s), rel=2e-3)


def test_example_of_the_deployment_guide():
    """10 s per checkpoint and a loss every 2 hours: about every 6 minutes."""
    assert young_s(10.0, 7200.0) / 60 == pytest.approx(6.3, abs=0.1)


def test_interval_is_within_bounds():
    assert best_interval_s(1.0, 0.0, DAY) == pytest.approx(math.sqrt(2 * DAY))
    assert best_interval_s(100.0, 0.0, 100 * DAY) == 1800  # however rare failures are
    assert best_interval_s(1.0, 60.0, DAY) == 600  # writes take a tenth of the time
    assert best_interval_s(0.0, 0.0, DAY) == 0


def test_mean_time_to_failure_is_learned():
    assert mean_time_to_failure_s(1, 0.0) == DAY
    assert mean_time_to_failure_s(1, 30 * DAY) == 31 * DAY
    # A failure every 10 minutes, for a day.
    assert mean_time_to_failure_s(145, DAY) == pytest.approx(600 * 2, rel=0.01)


def test_intervals_are_multiples_of_one_another():
    found = {interval_samples(s, 100.0, 4096) for s in np.geomspace(0.1, 1e5, 200)}
    assert found == {4096 * 2**k for k in range(12)}
    for seconds in (50.0, 300.0, 1800.0):
        samples = interval_samples(seconds, 100.0, 4096)
        assert seconds / 2 < samples / 100 <= seconds
    # Not below one log interval.
    assert interval_samples(1.0, 100.0, 4096) == 4096


@pytest.mark.parametrize("mtbf_s", [1800.0, DAY])
@pytest.mark.parametrize(("stop_s", "write_s"), [(0.1, 1.0), (2.0, 10.0)])
def test_chosen_interval_is_nearly_the_best_of_simulated_runs(mtbf_s, stop_s, write_s):
    kind = Kind("all workers", 1 / mtbf_s, False, 5.0, 15.0, 0.0, 0.0)
    run = Situation(200 * mtbf_s, 1, 1, (1.0,), stop_s, write_s, (kind,))
    samples = interval_samples(best_interval_s(stop_s, write_s, mtbf_s), 1000.0, 4096)
    intervals = np.concatenate([[samples / 1000], np.geomspace(write_s + 0.1, mtbf_s, 20)])
    goodput = play(run, intervals, 0, 8).goodput.reshape(-1, 8).mean(axis=1)
    assert goodput[0] > goodput.max() - 0.02


def config(*settings):
    return load_config("digits", ["run.log_every_samples=100", *settings])


@pytest.mark.parametrize(
    ("batch", "steps", "samples"), [(64, 1, 4096), (4096, 1, 204_800), (64, 5, 16_000)]
)
def test_log_intervals_have_enough_steps_by_default(batch, steps, samples):
    sizes = [f"run.global_batch={batch}", f"game.num_discriminator_steps={steps}"]
    found = load_config("digits", [*sizes, "run.log_every_samples=auto"])
    assert found.log_every_samples == samples
    assert config(*sizes).log_every_samples == 100


def test_configured_interval_is_kept():
    interval = CheckpointInterval(config("run.checkpoint_every_samples=300"))
    assert not interval.is_chosen
    interval.take_over(700)
    assert interval.samples == 300


def test_first_checkpoint_is_at_the_first_log_step_and_shows_the_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    interval = CheckpointInterval(config("run.checkpoint_every_samples=auto"))
    assert interval.is_chosen
    interval.choose(ALONE, 100.0, 1, 0.0)
    assert interval.samples == 100
    with interval.stop():
        since = interval.writes()
        now[0] += 0.1
    interval.choose(ALONE, 100.0, 1, 0.0)
    young = 100 * young_s(0.1, DAY)
    assert young / 2 < interval.samples <= young
    # It is still being written a minute later: no more than a tenth of the time is for that.
    now[0] += 60.0
    interval.choose(ALONE, 100.0, 1, 0.0)
    assert interval.samples > 100 * 300
    slow = interval.samples
    interval.written(since)
    now[0] += 600.0
    interval.choose(ALONE, 100.0, 1, 0.0)
    assert interval.samples == slow
    # One that is reported late, after the next has begun.
    first = interval.writes()
    now[0] += 1.0
    second = interval.writes()
    interval.written(first)
    now[0] += 6000.0
    interval.choose(ALONE, 100.0, 1, 0.0)
    assert interval.samples > 8 * slow
    interval.written(second)


def test_interval_of_others_is_taken_over_if_it_fits_the_log_interval():
    interval = CheckpointInterval(config("run.checkpoint_every_samples=auto"))
    interval.take_over(None)
    assert interval.samples == 100
    interval.take_over(400)
    assert interval.samples == 400
    interval.take_over(450)
    assert interval.samples == 400


@pytest.mark.parametrize("key", ["nonfinite", "spike"])
def test_runs_that_may_roll_back_need_a_fixed_interval(key):
    settings = [f"health.{key}=rollback", "run.checkpoint_every_samples=auto"]
    with refused(ConfigError, "run.checkpoint_every_samples"):
        load_config("digits", settings)
    load_config("digits", [settings[0], "run.checkpoint_every_samples=16384"])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "never", "'AUTO'", "true"])
def test_another_interval_is_refused(value):
    with refused(ConfigError, "run.checkpoint_every_samples"):
        load_config("digits", [f"run.checkpoint_every_samples={value}"])


def test_run_with_a_chosen_interval_saves_it_and_ends_in_the_same_weights(tmp_path, capsys):
    """Costs of a few milliseconds, intervals of tens of steps: far below 100 log intervals."""
    small = ["run.total_samples=640", "run.log_every_samples=32", "run.global_batch=16"]
    small += ['model.generator={name="residual", width=4}', "evaluate.metrics=[]"]
    small += ['model.discriminator={name="residual", width=4}', "run.keep_checkpoints=99"]
    digests = []
    for every in ("auto", "640"):
        folder = tmp_path / every
        sets = [*small, f"run.checkpoint_every_samples={every}"]
        words = [word for setting in sets for word in ("--set", setting)]
        assert main(["train", "digits", "--local", "--run-dir", str(folder), *words]) == 0
        capsys.readouterr()
        assert main(["inspect", str(folder), "--digest"]) == 0
        digests.append(capsys.readouterr().out)
    assert digests[0] == digests[1]
    states = sorted((tmp_path / "auto").glob("checkpoints/*/state.json"))
    assert 2 <= len(states) < 20
    saved = [json.loads(path.read_text()) for path in states]
    assert saved[0]["samples_seen"] == 32
    for state in saved:
        assert state["checkpoint_every_samples"] % 32 == 0
    assert saved[-1]["checkpoint_every_samples"] > 32
