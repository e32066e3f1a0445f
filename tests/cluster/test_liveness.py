"""Long evaluations are not hangs, signals interrupt them, and helper processes may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from faulty_runs import HEAD
from support import HANG_S, end_group, marked_processes, start_gatdist, wait_until

pytestmark = pytest.mark.cluster

TOTAL = 1280
# On an idle machine it takes 1 to 3 s; finishing the evaluation would take a minute.
LIMIT_S = 5
TICK = 320
SETTINGS = [
    f"run.total_samples={TOTAL}",
    f"run.log_every_samples={TICK}",
    "run.checkpoint_every_samples=320",
    "run.reduction=canonical",
    "run.virtual_workers=2",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    "evaluate.every_samples=640",
    "evaluate.num_samples=1797",
    "evaluate.features=slow",
    'evaluate.metrics=["swd"]',
    'plugins=["slow_features"]',
    "run.keep_checkpoints=9",
]
# 1,797 real and as many fake samples are evaluated in chunks of 256: 8 of each.
PLUGIN = (
    HEAD
    + """
from gatdist import register_feature_extractor
from gatdist.evaluation.features import Coordinates
(folder / "processes").mkdir(exist_ok=True)
(folder / "processes" / str(os.getpid())).touch()
@register_feature_extractor("slow")
class Slow(Coordinates):
    def __call__(self, samples):
        (folder / f"chunk-{here.rank}-{here.attempt}-{here.step}").touch()
        time.sleep(float((folder / "seconds").read_text()))
        return super().__call__(samples)
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with a feature extractor that takes a second per chunk."""
    (tmp_path / "slow_features.py").write_text(PLUGIN)
    slow(tmp_path, 0)
    return tmp_path


def slow(folder: Path, seconds: float) -> None:
    (folder / "seconds").write_text(str(seconds))


def start(folder: Path, *words: str, settings=(), env=None) -> subprocess.Popen[str]:
    sets = [w for setting in (*SETTINGS, *settings) for w in ("--set", setting)]
    return start_gatdist(
        "train", "digits", "--json", "--run-dir", "run", *words, *sets, cwd=folder, env=env
    )


def finish(process, timeout_s=HANG_S):
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        process.communicate()  # closes its pipes, which the guards of a later test would report
        raise
    finally:
        end_group(process)
    return process.returncode, output, errors


def finish_soon(process):
    began = time.monotonic()
    status, _, errors = finish(process, 30)
    took_s = time.monotonic() - began
    assert took_s < LIMIT_S, errors
    return status, errors


def committed(folder: Path) -> list[int]:
    found = folder.glob("run/checkpoints/*/MANIFEST.json")
    return sorted({int(path.parent.name.partition(".")[0]) for path in found})


def attempts(folder: Path):
    lines = (folder / "run/attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def lines_of(folder: Path):
    """Return what metrics.jsonl contains that does not depend on the time of day."""
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    names = ("samples_seen", "loss/generator", "loss/discriminator", "metric/swd", "protocol")
    return [{name: line.get(name) for name in names} for line in lines]


def require_same_lines(found, expected):
    """Assert that all metrics are equal, except for log intervals that a stop has split."""
    stops = {line["samples_seen"] for line in found} - {line["samples_seen"] for line in expected}
    divided = {-(-stop // TICK) * TICK for stop in stops}
    whole = [
        [line for line in lines if line["samples_seen"] not in stops | divided]
        for lines in (found, expected)
    ]
    assert whole[0] == whole[1]
    measured = [
        [(line["samples_seen"], line["metric/swd"], line["protocol"]) for line in lines]
        for lines in ([line for line in found if line["samples_seen"] not in stops], expected)
    ]
    assert measured[0] == measured[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_gatdist):
    """The digest and the lines of metrics.jsonl of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "slow_features.py").write_text(PLUGIN)
    slow(folder, 0)
    status, _, errors = finish(start(folder, "--local"))
    assert status == 0, errors
    assert [line["metric/swd"] is not None for line in lines_of(folder)] == [False, True] * 2
    return digest(run_gatdist, folder), lines_of(folder)


def digest(run_gatdist, folder):
    finished = run_gatdist("inspect", folder / "run", "--digest")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def on_ray(address: str) -> tuple[str, ...]:
    return "--workers", "2", "--address", address


LOCAL_FIRST = pytest.mark.parametrize(
    "launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture(params=["local", "ray"])
def launcher(request):
    """How training is launched."""
    if request.param == "local":
        return ("--local",)
    return on_ray(request.getfixturevalue("ray_address"))


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_signal_interrupts_evaluation_and_resume_repeats_it(
    number, launcher, folder, undisturbed, run_gatdist
):
    slow(folder, 4)
    process = start(folder, *launcher, env={"PYTHONUNBUFFERED": "1"})
    try:
        wait_until((folder / "chunk-0-1-10").exists, "an evaluation")
        time.sleep(0.3)
        process.send_signal(number)
        status, errors = finish_soon(process)
    finally:
        end_group(process)
    assert status == 75, errors
    assert "Traceback" not in errors
    assert errors.count("checkpoint at 640") == 1
    assert committed(folder)[-1] == 640, "no step is lost"
    slow(folder, 0)
    status, output, errors = finish(start(folder, *launcher))
    assert status == 0, errors
    assert attempts(folder)[-1]["resumed_from"] == 640
    assert json.loads(output)["metrics"]["swd"] == undisturbed[1][-1]["metric/swd"]
    assert (digest(run_gatdist, folder), lines_of(folder)) == undisturbed


@LOCAL_FIRST
def test_sigkill_in_evaluation_loses_no_step(launcher, folder, undisturbed, run_gatdist):
    with (folder / "slow_features.py").open("a") as plugin:
        plugin.write('fail_at("evaluation", kill, rank=0, step=10)\n')
    status, _, errors = finish(start(folder, *launcher, settings=["cluster.max_failures=0"]))
    assert status == (-9 if "--local" in launcher else 75), errors
    assert committed(folder)[-1] == 640
    status, _, errors = finish(start(folder, *launcher))
    assert status == 0, errors
    assert attempts(folder)[-1]["resumed_from"] == 640
    assert (digest(run_gatdist, folder), lines_of(folder)) == undisturbed


@LOCAL_FIRST
@pytest.mark.parametrize(
    "where",
    [
        "start",
        pytest.param("first step", marks=pytest.mark.slow),
        "commit",
        pytest.param("twice", marks=pytest.mark.slow),
    ],
)
def test_signal_at_start_in_commit_or_twice_corrupts_nothing(
    where, launcher, folder, undisturbed, run_gatdist
):
    plugin = {
        "start": '(folder / "here").touch(); time.sleep(20)\n',
        "first step": 'fail_at("generator", lambda: ((folder / "here").touch(), time.sleep(20)))\n',
        # Steps are so slow that the run does not end before it checks for signals again.
        "commit": 'fail_at("commit/MANIFEST.json", lambda: ((folder / "here").touch(), '
        "time.sleep(2)), rank=0, step=5)\n"
        'for step in range(6, 20): fail_at("data", lambda: time.sleep(0.2), step=step)\n',
        "twice": 'fail_at("commit/MANIFEST.json", lambda: ((folder / "here").touch(), '
        "time.sleep(2)), rank=0, step=5)\n",
    }[where]
    (folder / "slow_features.py").write_text(PLUGIN + plugin)
    process = start(folder, *launcher)
    try:
        wait_until((folder / "here").exists, "the place")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        if where == "twice":
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        status, errors = finish_soon(process)
    finally:
        end_group(process)
    assert status == 75, errors
    assert "Traceback" not in errors
    (folder / "slow_features.py").write_text(PLUGIN)
    status, _, errors = finish(start(folder, *launcher))
    assert status == 0, errors
    assert digest(run_gatdist, folder) == undisturbed[0]
    require_same_lines(lines_of(folder), undisturbed[1])


@pytest.mark.lasting
def test_evaluation_longer_than_heartbeat_timeout_is_not_a_hang(
    folder, ray_address, undisturbed, run_gatdist
):
    # Two evaluations of 12 s or more on each of two workers, 24 s the first time.
    slow(folder, 3)
    settings = ["cluster.heartbeat_timeout_s=20", "cluster.straggler_warn_s=5"]
    status, _, errors = finish(start(folder, *on_ray(ray_address), settings=settings))
    assert status == 0, errors
    assert len(attempts(folder)) == 1, errors
    assert (digest(run_gatdist, folder), lines_of(folder)) == undisturbed


@pytest.mark.slow
def test_evaluation_of_a_minute_is_not_a_hang_with_timeout_of_eight_seconds(folder, ray_address):
    slow(folder, 2)
    settings = [
        "cluster.heartbeat_timeout_s=8",
        "evaluate.every_samples=0",
        "evaluate.num_samples=15360",  # 60 chunks of fakes, 30 on each worker
    ]
    began = time.monotonic()
    status, _, errors = finish(start(folder, *on_ray(ray_address), settings=settings))
    assert status == 0, errors
    assert time.monotonic() - began > 60
    assert len(attempts(folder)) == 1, errors
    assert lines_of(folder)[-1]["metric/swd"] is not None


@pytest.mark.slow
def test_worker_waits_for_long_evaluation_of_another(folder, ray_address):
    source = PLUGIN.replace("float(", "(here.rank == 0) * float(")
    (folder / "slow_features.py").write_text(source)
    slow(folder, 2)
    settings = ["cluster.heartbeat_timeout_s=6", "cluster.straggler_warn_s=2"]
    status, _, errors = finish(start(folder, *on_ray(ray_address), settings=settings))
    assert status == 0, errors
    assert len(attempts(folder)) == 1, errors


@pytest.mark.lasting
def test_stuck_evaluation_is_a_hang(folder, ray_address, undisturbed, run_gatdist):
    """Also that of a worker that has replaced the first one."""
    stuck = 'fail_at("evaluation", once(lambda: time.sleep(1000)), rank=1, step=10, attempt=None)\n'
    with (folder / "slow_features.py").open("a") as plugin:
        plugin.write(2 * stuck)
    settings = ["cluster.heartbeat_timeout_s=20", "cluster.straggler_warn_s=5"]
    status, _, errors = finish(start(folder, *on_ray(ray_address), settings=settings))
    assert status == 0, errors
    assert len(attempts(folder)) == 1, errors
    found = (folder / "run/worker_changes.jsonl").read_text().splitlines()
    for change in map(json.loads, found):
        assert "worker 1" in change["reason"], errors
        assert "phase 'evaluation'" in change["reason"]
        assert change["samples_seen"] == 640
    assert len(found) == 2
    assert list(folder.glob("run/logs/stacks-*.txt"))
    assert (digest(run_gatdist, folder), lines_of(folder)) == undisturbed


def processes_of(mark: str, *names: str) -> list[int]:
    """Return processes of a run whose command line or title contains one of the names."""
    found = []
    for process in marked_processes(mark):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(name in words for name in names):
            found.append(process)
    return found


@pytest.mark.lasting
@pytest.mark.parametrize(
    "helper",
    [
        "Mailbox",
        pytest.param("TrainController", marks=pytest.mark.slow),
        pytest.param("RayTrainWorker", marks=pytest.mark.slow),
    ],
)
def test_killed_helper_process_is_restarted(helper, folder, undisturbed, run_gatdist):
    """Kill helpers of a local Ray in training: at step 7 of 20, after 1 of 4 log intervals."""
    mark = f"gatdist-helper-{os.getpid()}-{helper}"
    with (folder / "slow_features.py").open("a") as plugin:
        plugin.write(
            'def pause():\n    (folder / "here").touch()\n'
            '    while not (folder / "killed").exists(): time.sleep(0.05)\n'
            'fail_at("data", pause, rank=0, step=7)\n'
        )
    process = start(folder, "--workers", "2", env={"MARK": mark})
    try:
        wait_until((folder / "here").exists, "the step")
        victims = processes_of(mark, helper)
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        wait_until(lambda: victims[0] not in processes_of(mark, helper), "its end")
        assert process.poll() is None
        assert len(lines_of(folder)) == 1, "it was killed while the run was training"
        (folder / "killed").touch()
        status, _, errors = finish(process)
    finally:
        end_group(process)
    assert status == 0, errors
    assert "Traceback" not in errors
    lines, expected_digest, expected = lines_of(folder), undisturbed[0], [*undisturbed[1]]
    if helper == "RayTrainWorker":  # the other one continues
        changes = (folder / "run/worker_changes.jsonl").read_text().splitlines()
        assert len(changes) == 1, errors
        # A lost worker's part of the means of the interval is lost, too.
        lines[1], expected[1] = (
            {name: line[name] for name in ("samples_seen", "metric/swd")}
            for line in (lines[1], expected[1])
        )
    else:
        assert len(attempts(folder)) == (1 if helper == "Mailbox" else 2), errors
    assert lines == expected
    assert digest(run_gatdist, folder) == expected_digest


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_long_temporary_folder_is_rejected_before_ray_starts(variable, folder, run_gatdist):
    deep = folder / ("a" * 60) / ("b" * 40)
    deep.mkdir(parents=True)
    finished = run_gatdist("train", "digits", "--run-dir", "run", cwd=folder, env={variable: deep})
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"gatdist: {variable} = ")
    assert not (folder / "run/logs/ray.log").exists()
