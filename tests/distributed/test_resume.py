"""Killed at random times and resumed, a run ends as an uninterrupted one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOTAL, TICK = 8960, 640
SETTINGS = [
    f"run.total_samples={TOTAL}",
    f"run.log_every_samples={TICK}",
    f"run.checkpoint_every_samples={TICK}",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    # Every setting that has adaptive state.
    'game.augmentation={name="ada", adjust_samples=20000}',
    "game.penalties={r1={strength=1.0, every_steps=4}, lecam={strength=0.1},"
    " path_length={strength=0.1, every_steps=8}}",
    "game.lazy_penalties=separate",
    'model.spectral_norm=["discriminator"]',
    "optim.generator.direction=optimistic",
    "health.spike=skip",
    "evaluate.every_samples=0",
    "evaluate.metrics=[]",
]


def command(run_dir, *more):
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        sys.executable,
        "-m",
        "gatdist",
        "train",
        "digits",
        "--local",
        "--run-dir",
        str(run_dir),
        *sets,
        *more,
    ]


def digest_of(run_gatdist, run_dir):
    finished = run_gatdist("inspect", run_dir, "--digest")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def clock_of(run_dir: Path) -> int:
    """Return ``samples_seen`` of the newest committed checkpoint."""
    committed = [p.parent.name for p in run_dir.glob("checkpoints/*/MANIFEST.json")]
    return max((int(name.partition(".")[0]) for name in committed), default=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(run_dir), check=True, timeout=300, capture_output=True)
    return run_dir


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(0, 2), *(pytest.param(seed, 5, marks=pytest.mark.slow) for seed in (1, 2, 3))],
)
def test_runs_killed_at_random_end_with_the_same_digest(
    seed, kills, undisturbed, tmp_path, run_gatdist
):
    """Each kill comes at a random time: in a commit, a log interval or the first steps."""
    chance = random.Random(seed)
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    # Five attempts of at most a seventh each: the run does not end before the last kill.
    longest_life_s = json.loads(lines[-1])["wall_time_s"] / 7
    for _ in range(kills):
        process = subprocess.Popen(
            command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        attempts = tmp_path / "attempts.jsonl"
        began = len(attempts.read_text().splitlines()) if attempts.exists() else 0
        deadline = time.monotonic() + 60
        while not attempts.exists() or len(attempts.read_text().splitlines()) == began:
            assert process.poll() is None, "it ended before its attempt began"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0, longest_life_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    subprocess.run(command(tmp_path), check=True, timeout=300, capture_output=True)
    assert digest_of(run_gatdist, tmp_path) == digest_of(run_gatdist, undisturbed)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [line["samples_seen"] for line in lines]
    assert seen == sorted(set(seen))
    assert seen[-1] == TOTAL


def test_ctrl_c_checkpoints_and_the_same_command_resumes(undisturbed, tmp_path, run_gatdist):
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 75
    assert "Traceback" not in message
    stopped_at = clock_of(tmp_path)
    assert TICK <= stopped_at < TOTAL
    subprocess.run(command(tmp_path), check=True, timeout=300, capture_output=True)
    resumed = [
        json.loads(line)["resumed_from"]
        for line in (tmp_path / "attempts.jsonl").read_text().splitlines()
    ]
    assert resumed == [None, stopped_at]
    assert digest_of(run_gatdist, tmp_path) == digest_of(run_gatdist, undisturbed)


def test_second_ctrl_c_exits_at_once(tmp_path):
    # A step so long that the loop can't handle the first signal before the second.
    slow = [
        "--set",
        "run.global_batch=1024",
        "--set",
        'model.generator={name="residual", width=256}',
    ]
    process = subprocess.Popen(command(tmp_path, *slow), stderr=subprocess.PIPE, text=True)
    attempts = tmp_path / "attempts.jsonl"
    deadline = time.monotonic() + 60
    while not attempts.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)  # into the first step
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "checkpoint" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert clock_of(tmp_path) == 0


def test_rerun_of_finished_run_reports_it_and_changes_nothing(undisturbed, run_gatdist):
    before = (undisturbed / "attempts.jsonl").read_text(), digest_of(run_gatdist, undisturbed)
    finished = subprocess.run(
        command(undisturbed, "--json"), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0
    outcome = json.loads(finished.stdout)
    assert outcome["status"] == "finished"
    assert (
        (undisturbed / "attempts.jsonl").read_text(),
        digest_of(run_gatdist, undisturbed),
    ) == before


def test_run_directory_of_another_configuration_is_rejected_with_both_values(undisturbed):
    finished = subprocess.run(
        command(undisturbed, "--set", "run.seed=5"), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("gatdist: run.seed = 5: ")
    assert "started with 0" in finished.stderr
