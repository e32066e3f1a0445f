"""Training in processes that torchrun or srun starts, without Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gatdist.cluster.torchrun import Launch, device_name, launched
from gatdist.common.errors import ClusterError, ConfigError
from support import end_group, free_port, refused, start_gatdist, wait_until

VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SETTINGS = [
    "run.total_samples=1280",
    "run.log_every_samples=320",
    "run.checkpoint_every_samples=320",
    "run.reduction=canonical",
    "evaluate.num_samples=128",
]


def arguments(run_dir: Path, *more: str) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["train", "digits", "--run-dir", str(run_dir), *sets, *more]


@pytest.fixture
def start(tmp_path):
    """Start two processes like srun, one of which can't import Ray."""
    (tmp_path / "blocked/ray").mkdir(parents=True)
    (tmp_path / "blocked/ray/__init__.py").write_text("raise ImportError('blocked')")
    started = []

    def start(*args: str, env: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
        port = str(free_port())
        path = os.pathsep.join([str(tmp_path / "blocked"), os.environ.get("PYTHONPATH", "")])
        processes = [
            start_gatdist(
                *args,
                cwd=tmp_path,
                env=VARIABLES
                | {"RANK": str(rank), "MASTER_PORT": port, "PYTHONPATH": path}
                | (env or {}),
            )
            for rank in range(2)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        end_group(process)


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], errors


def digest_of(run_gatdist, run_dir: Path) -> str:
    finished = run_gatdist("inspect", run_dir, "--digest")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """The same run in one process: a canonical run does not depend on the number of processes."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    command = [sys.executable, "-m", "gatdist", *arguments(run_dir, "--local")]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    return run_dir


def test_torchrun_trains_the_run_of_one_process(reference_run, tmp_path, run_gatdist):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "gatdist", *arguments(tmp_path / "run")]
    finished = subprocess.run(command, timeout=240, capture_output=True, text=True, check=True)
    assert finished.stderr.count("done after") == 1  # only rank 0 reports
    assert digest_of(run_gatdist, tmp_path / "run") == digest_of(run_gatdist, reference_run)


DIES_ONCE = """
import os
import signal
import sys

from gatdist.cli import main
from gatdist.cluster import torchrun

def join_and_die(*args, **kwargs):
    join(*args, **kwargs)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

join, torchrun.join = torchrun.join, join_and_die
sys.exit(main())
"""


def test_torchrun_restarts_processes_that_were_connected(tmp_path):
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command = [*launcher, "--nproc-per-node", "2", "dies_once.py"]
    few = ["--set", "run.total_samples=320", "--set", "evaluate.metrics=[]"]
    command += arguments(tmp_path / "run", *few)
    finished = subprocess.run(command, timeout=240, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "done after" in finished.stderr


def test_hang_stop_request_and_lost_process(reference_run, start, tmp_path, run_gatdist):
    run_dir = tmp_path / "run"
    processes = start(*arguments(run_dir, "--set", "cluster.heartbeat_timeout_s=6"))
    wait_until((run_dir / "metrics.jsonl").exists, "the first metrics", timeout_s=120)
    processes[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: [*run_dir.glob("logs/stacks-*-rank-0.txt")], "stacks", timeout_s=60)
    (stacks,) = run_dir.glob("logs/stacks-*-rank-0.txt")
    assert re.search(r"collectives: launched \d+, completed \d+", stacks.read_text())
    processes[1].send_signal(signal.SIGCONT)
    processes[1].send_signal(signal.SIGTERM)  # to one of them: all stop after a checkpoint
    statuses, errors = ended(processes)
    assert statuses == [75, 75]
    assert ["everything is saved" in error for error in errors] == [True, False]
    assert ["stacks" in error for error in errors] == [True, False]

    processes = start(*arguments(run_dir))
    attempts = run_dir / "attempts.jsonl"
    wait_until(lambda: len(attempts.read_text().splitlines()) == 2, "an attempt", timeout_s=120)
    processes[1].kill()
    statuses, errors = ended(processes)
    assert statuses == [75, -signal.SIGKILL]
    assert "lost its connections" in errors[0]

    statuses, _ = ended(start(*arguments(run_dir)))
    assert statuses == [0, 0]
    assert digest_of(run_gatdist, run_dir) == digest_of(run_gatdist, reference_run)


@pytest.mark.parametrize(
    ("more", "subject"),
    [
        (["--set", "game.loss=nosuch"], "game.loss"),
        (["--workers", "3"], "cluster.workers"),
        (["--local"], "--local"),
    ],
)
def test_bad_input_ends_all_processes(start, tmp_path, more, subject):
    statuses, errors = ended(start(*arguments(tmp_path / "run", *more)))
    assert statuses == [2, 2]
    assert f"gatdist: {subject} = " in errors[0]
    assert not (tmp_path / "run").exists()


def test_error_of_rank_0_only_is_shown_once(start, tmp_path):
    (tmp_path / "file").write_text("")
    statuses, errors = ended(start(*arguments(tmp_path / "file/run")))
    assert statuses == [2, 2]
    assert [error.count("gatdist: ") for error in errors] == [1, 0]


def test_launched():
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "2"}) is None  # a stray variable
    assert launched(VARIABLES) == Launch(1, 2, 0, "127.0.0.1", 29500)
    assert launched(VARIABLES | {"LOCAL_RANK": "3"}) == Launch(1, 2, 3, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "65536"),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("RANK", "²"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", ""),
        ("LOCAL_RANK", "x"),
    ],
)
def test_bad_variables_are_rejected(name, value):
    with refused(ConfigError, name):
        launched(VARIABLES | {name: value})


@pytest.mark.parametrize(
    ("local_rank", "visible", "device"),
    [
        *((0, 0, "cpu"), (3, 0, "cpu"), (0, 1, "cuda:0")),
        *((3, 8, "cuda:3"), (7, 8, "cuda:7")),
        (3, 1, "cuda:0"),  # srun --gpus-per-task=1
    ],
)
def test_each_process_uses_its_own_device(local_rank, visible, device):
    assert device_name(local_rank, visible) == device


def test_more_processes_than_gpus_are_rejected():
    with refused(ClusterError, "LOCAL_RANK"):
        device_name(4, 4)


def test_process_that_does_not_start_is_named(start, tmp_path):
    """A launcher that started too few processes."""
    processes = start(
        *arguments(tmp_path / "run", "--set", "cluster.startup_timeout_s=5"),
        env={"WORLD_SIZE": "4"},
    )
    statuses, errors = ended(processes)
    assert statuses == [2, 2]
    assert "worker 2, worker 3 did not join" in errors[0]
    assert "worker 0 on" in errors[0]
