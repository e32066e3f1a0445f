"""SkyPilot's commands, run on two hosts on which another Ray is already running."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from host_runs import Runs

from benchmarks.hosts import Hosts
from support import end_group, marked_processes, wait_until

pytestmark = pytest.mark.hosts

FILE = Path(__file__).resolve().parents[3] / "deploy/skypilot/train.yaml"


def test_two_machines_train_and_do_not_stop_skypilots_ray(hosts: Hosts, tmp_path: Path) -> None:
    task = yaml.safe_load(FILE.read_text())
    mark = f"SKY={tmp_path}"
    (tmp_path / "venv").symlink_to(sys.prefix)  # where the file's setup would put it
    environment = task["envs"] | {
        "HOME": str(tmp_path),
        "SKY": str(tmp_path),
        "RUN_DIR": str(tmp_path / "run"),
        "OPTIONS": "--set run.total_samples=640 --set evaluate.metrics=[]",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
        "SKYPILOT_NODE_IPS": "\n".join(host.address for host in hosts.workers),
    }
    processes, logs = [], [tmp_path / host.name for host in hosts.workers]
    try:
        for rank, host in enumerate(hosts.workers):
            with logs[rank].open("w") as log:
                processes.append(
                    host.start(
                        "bash", "-c", task["run"],
                        cwd=tmp_path, env=environment | {"SKYPILOT_NODE_RANK": str(rank)},
                        stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        statuses = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            end_group(process)
        # These are processes of SkyPilot's Ray, whose machines are simply terminated.
        shutil.rmtree("/tmp/gatdist", ignore_errors=True)
        sys.stderr.write("\n".join(log.read_text()[-4000:] for log in logs))
    assert statuses == [0, 0]
    (attempt,) = Runs(hosts, tmp_path).attempts()
    assert sorted(attempt["hosts"]) == ["w1", "w2"]
    wait_until(lambda: not marked_processes(mark), "an end of all that was started")
    assert sorted(hosts.alive()) == ["head", "w1", "w2"]
