"""Training under real Ray Train: output, leftover processes, and recovery from kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gatdist.cluster.metrics import metric_name
from support import end_group, marked_processes, start_gatdist, wait_until

pytestmark = pytest.mark.cluster

SETTINGS = [
    "run.total_samples=6400",
    "run.log_every_samples=640",
    "run.checkpoint_every_samples=640",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    "evaluate.every_samples=0",
    "evaluate.num_samples=128",
    'plugins=["notes_its_process"]',
]
PLUGIN = """
import os, pathlib
folder = pathlib.Path(__file__).parent / "processes"
folder.mkdir(exist_ok=True)
(folder / str(os.getpid())).touch()
"""
BROKEN = """
from gatdist import register_loss
from gatdist.game import Loss
def broken(real, fake):
    if len(real) > 4:  # not in the check at the start
        raise ValueError("this loss is broken")
    return fake - real
register_loss("broken", Loss(broken, lambda r, f: -f))
def infinite(real, fake):
    return fake * (float("inf") if len(fake) > 4 else 1.0)
register_loss("infinite", Loss(infinite, lambda r, f: -f))
"""
REPORTS = """
import sys, time
import ray
from gatdist.cluster.metrics import Metrics
from gatdist.config import load_config
ray.init(sys.argv[1], log_to_driver=False)
metrics = Metrics(load_config("ring"), "s3://me:secret@bucket/run")
values = {"loss/generator": 1.0, "health/collapse": 1.0, "metric/fid": 3.0}
metrics.event("log", {"samples_seen": 64, "time/data_s": 0.5} | values)
metrics.event("log", {"samples_seen": 128, "time/data_s": 0.25})
metrics.event("members", {"totals": {"workers/changes": 3.0, "workers/lost_s": 4.5}})
while True:
    metrics.look()
    time.sleep(0.1)
"""


@pytest.fixture
def folder(tmp_path):
    """A user's folder with their own modules."""
    (tmp_path / "notes_its_process.py").write_text(PLUGIN)
    (tmp_path / "broken_losses.py").write_text(BROKEN)
    return tmp_path


def arguments(address, *more, settings=()):
    sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [
        "train",
        "digits",
        "--workers",
        "2",
        "--address",
        address,
        "--run-dir",
        "run",
        *sets,
        *more,
    ]


def start(folder, address, *more, settings=()):
    return start_gatdist(*arguments(address, *more, settings=settings), cwd=folder)


def finish(process, timeout_s=300):
    try:
        output, errors = process.communicate(timeout=timeout_s)
    finally:
        end_group(process)
    return process.returncode, output, errors


def committed(folder: Path) -> list[str]:
    return sorted(p.parent.name[:9] for p in folder.glob("run/checkpoints/*/MANIFEST.json"))


def scrape(url):
    with suppress(OSError), urlopen(url, timeout=5) as answer:
        return answer.read().decode()
    return ""


def shown(page, run_dir):
    """Return the run's metrics from a Prometheus page by name."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("run") == str(run_dir)
    }


def attempts(folder):
    lines = (folder / "run/attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ray_address, ray_metrics_url):
    """An uninterrupted run of two workers: its folder and its output.

    The file ``scraped`` in the folder is the last Prometheus page of it.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "notes_its_process.py").write_text(PLUGIN)
    process = start(folder, ray_address, "--json")
    while process.poll() is None and committed(folder)[-1:] != ["000006400"]:
        page = scrape(ray_metrics_url)
        if "gatdist_loss" in page:
            (folder / "scraped").write_text(page)
        time.sleep(0.3)
    status, output, errors = finish(process)
    assert status == 0, errors
    return folder, output, errors


def digest(run_gatdist, folder):
    finished = run_gatdist("inspect", folder / "run", "--digest")
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_two_workers_train_and_terminal_shows_gatdist_output_only(undisturbed):
    folder, output, errors = undisturbed
    outcome = json.loads(output)
    assert outcome["status"] == "finished"
    assert outcome["samples_seen"] == 6400
    assert {"fid", "fid_over_real_split", "kid", "class_share_min"} <= outcome["metrics"].keys()
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["samples_seen"] for line in lines] == list(range(640, 6401, 640))
    assert {line["world_size"] for line in lines} == {2}
    assert all(line["time/communication_s"] > 0 for line in lines)
    assert lines[-1]["protocol"]["num_generated"] == 128
    (attempt,) = attempts(folder)
    assert attempt["world_size"] == len(attempt["hosts"]) == 2
    for noise in ("INFO", "WARNING", "ray::", "worker.py", "(TrainController", "Traceback"):
        assert noise not in errors
    assert (folder / "run/logs/ray.log").exists()


def test_torchrun_trains_the_same_run(undisturbed, folder, run_gatdist):
    words = arguments("", "--json")
    at = words.index("--workers")
    del words[at : at + 4]  # nor an address
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, "-m", "gatdist", *words],
        cwd=folder,
        timeout=300,
        check=True,
        capture_output=True,
    )
    assert digest(run_gatdist, folder) == digest(run_gatdist, undisturbed[0])


def test_prometheus_scrapes_the_run(undisturbed):
    folder, *_ = undisturbed
    found = shown((folder / "scraped").read_text(), folder / "run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    line = next(one for one in lines if one["samples_seen"] == found["ray_gatdist_samples_seen"])
    for tag in ("loss/generator", "gradient_norm/discriminator", "throughput/samples_per_s"):
        assert found[f"ray_{metric_name(tag)}"] == pytest.approx(line[tag], rel=1e-6)
    assert found["ray_gatdist_total_samples"] == 6400
    assert found["ray_gatdist_workers"] == found["ray_gatdist_workers_wanted"] == 2
    assert 0 < found["ray_gatdist_steps"] <= 100
    assert found["ray_gatdist_launches_total"] == 1
    assert found["ray_gatdist_checkpoint_samples"] % 640 == 0
    assert abs(found["ray_gatdist_checkpoint_time_seconds"] - time.time()) < 200


def test_past_alarm_is_0_and_nonfinite_loss_is_removed(ray_address, ray_metrics_url, tmp_path):
    (tmp_path / "reports.py").write_text(REPORTS)
    process = subprocess.Popen([sys.executable, "reports.py", ray_address], cwd=tmp_path)
    try:
        found = wait_until(
            lambda: (
                (found := shown(scrape(ray_metrics_url), "s3://me:***@bucket/run"))
                and found.get("ray_gatdist_samples_seen") == 128
                and "ray_gatdist_loss_generator" not in found
                and found
            ),
            "the second log interval, without a finite loss",
        )
    finally:
        process.kill()
        process.wait()
    assert found["ray_gatdist_health_collapse"] == 0
    assert found["ray_gatdist_metric_fid"] == 3, "of the last evaluation"
    assert found["ray_gatdist_time_data_seconds"] == 0.25
    assert found["ray_gatdist_workers_changes"] == 3
    assert found["ray_gatdist_workers_lost_seconds"] == 4.5


@pytest.mark.slow
def test_killed_worker_is_reported_and_rerun_ends_with_same_digest(
    undisturbed, folder, ray_address, run_gatdist
):
    process = start(folder, ray_address, settings=["cluster.max_failures=0"])
    wait_until(lambda: len(committed(folder)) >= 1, "a checkpoint", timeout_s=300)
    workers = {int(p.name) for p in (folder / "processes").iterdir()} - {process.pid}
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 75, errors
    assert str(folder / "run/logs/ray.log") in errors
    assert "Traceback" not in errors
    status, _, errors = finish(start(folder, ray_address))
    assert status == 0, errors
    assert attempts(folder)[-1]["resumed_from"] > 0
    assert digest(run_gatdist, folder) == digest(run_gatdist, undisturbed[0])


def test_ctrl_c_checkpoints_on_all_workers_and_rerun_ends_with_same_digest(
    undisturbed, folder, ray_address, run_gatdist
):
    process = start(folder, ray_address)
    wait_until((folder / "run/metrics.jsonl").exists, "the first log interval", timeout_s=300)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal: to the whole foreground process group
    status, _, errors = finish(process)
    assert status == 75, errors
    assert "Traceback" not in errors
    stopped_at = int(committed(folder)[-1])
    assert 0 < stopped_at < 6400
    status, _, errors = finish(start(folder, ray_address))
    assert status == 0, errors
    assert attempts(folder)[-1]["resumed_from"] == stopped_at
    assert digest(run_gatdist, folder) == digest(run_gatdist, undisturbed[0])


@pytest.mark.parametrize(
    ("loss", "status", "message"),
    [
        ("broken", 2, "ValueError: this loss is broken, at"),
        pytest.param(
            "infinite",
            1,
            "health.nonfinite = 'stop'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_error_in_worker_is_shown_without_traceback(loss, status, message, folder, ray_address):
    settings = ['plugins=["broken_losses"]', f"game.loss={loss}", "health.nonfinite=stop"]
    found, _, errors = finish(start(folder, ray_address, settings=settings))
    assert found == status
    assert message in errors
    assert "Traceback" not in errors


def test_more_workers_than_the_cluster_has_are_rejected(folder, ray_address):
    status, _, errors = finish(start(folder, ray_address, "--workers", "4"), timeout_s=300)
    assert status == 2
    assert "gatdist: --workers = 4: " in errors
    assert "--workers 2" in errors


def test_more_workers_than_this_machine_has_are_rejected_before_ray_starts(run_gatdist, tmp_path):
    settings = ("--set", "run.global_batch=4096")
    finished = run_gatdist("train", "digits", "--workers", "4096", *settings, cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("gatdist: --workers = 4096: ")
    assert str(os.cpu_count()) in finished.stderr
    assert not (tmp_path / "runs/digits/logs/ray.log").exists()


def test_unreachable_address_is_rejected(run_gatdist):
    finished = run_gatdist("train", "digits", "--workers", "2", "--address", "127.0.0.1:9")
    assert finished.returncode == 2
    assert finished.stderr.startswith("gatdist: cluster.address = '127.0.0.1:9': ")


@pytest.mark.slow
def test_second_ctrl_c_exits_at_once_and_stops_local_ray(folder):
    mark = f"gatdist-test-second-{os.getpid()}"
    # A step so long that the workers can't handle the first signal before the second.
    slow = ["run.global_batch=4096", 'model.generator={name="residual", width=256}']
    sets = [w for s in (*SETTINGS, *slow) for w in ("--set", s)]
    process = start_gatdist(
        "train",
        "digits",
        "--workers",
        "2",
        "--run-dir",
        "run",
        *sets,
        cwd=folder,
        env={"MARK": mark},
    )
    try:
        for line in process.stderr:
            if line.startswith("parameters"):  # the workers are training
                os.killpg(process.pid, signal.SIGINT)
            if line.startswith("stopping"):
                os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 75
        wait_until(lambda: not marked_processes(mark), "our Ray's processes to end")
    finally:
        end_group(process)
        process.stdout.close()
        process.stderr.close()
    assert committed(folder) == []


def test_local_ray_requires_a_token_and_stops_with_the_run(folder, run_gatdist):
    mark = f"gatdist-test-{os.getpid()}"
    sets = [w for s in (*SETTINGS, "run.total_samples=6400000") for w in ("--set", s)]
    process = start_gatdist(
        "train", "digits", "--run-dir", "run", *sets, cwd=folder,
        env={"GATDIST_MARK": mark, "RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None},
    )  # fmt: skip
    try:
        for line in process.stderr:
            if line.startswith("parameters"):  # the workers are training
                break
        address = f"127.0.0.1:{port_of_gcs(marked_processes(mark))}"
        stranger = run_gatdist(
            "doctor", "--address", address,
            env={"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None, "HOME": str(folder)},
        )  # fmt: skip
        assert stranger.returncode == 2, stranger.stdout + stranger.stderr
        assert stranger.stderr.startswith(f"gatdist: cluster.address = '{address}': ")
        assert "RAY_AUTH_TOKEN" in stranger.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75, process.stderr.read()
        wait_until(lambda: not marked_processes(mark), "our Ray's processes to end")
    finally:
        end_group(process)
        process.stdout.close()
        process.stderr.close()


def port_of_gcs(processes):
    """Return the port on which the first GCS among these processes listens."""
    for process in processes:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        if words[0].endswith("gcs_server"):
            inodes = {os.readlink(fd) for fd in Path(f"/proc/{process}/fd").iterdir()}
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                        return int(fields[1].rpartition(":")[2], 16)
    raise AssertionError("no gcs_server listens")
