"""``gatdist bench scaling`` on real Ray: output format, recovery after a kill, and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster

TINY = ["--size", "dcgan64_w4", "--batch", "4", "--rounds", "1"]
QUALITY = """
run = { total_samples = 640, log_every_samples = 640, checkpoint_every_samples = 640 }
data = { url = "builtin:ring" }
model = { generator = { name = "mlp" }, discriminator = { name = "mlp" }, latent_size = 8 }
evaluate = { metrics = ["fid"], num_samples = 128 }
"""
DIES = """
import os, signal, sys
from gatdist.cluster.groups import groups
from gatdist.common.errors import WorkerLostError

def die(comm, report, interface):
    report("about to die")
    comm.any(False)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.any(False)

def rank(comm, report, interface):
    return comm.rank

def main():
    with groups(sys.argv[1], 2) as group:
        try:
            group.together(2, die)
        except WorkerLostError as error:
            message = str(error)
        ranks, _ = group.together(2, rank)
    print(message, ranks)
"""


@pytest.mark.parametrize(
    ("workers", "quality"), [([2], False), pytest.param([1, 2], True, marks=pytest.mark.slow)]
)
def test_points_recovery_quality_and_files(workers, quality, run_gatdist, ray_address, tmp_path):
    (tmp_path / "ring.toml").write_text(QUALITY)
    finished = run_gatdist(
        "bench", "scaling", "--workers", ",".join(map(str, workers)), "--address", ray_address,
        "--json", *TINY, "--mode", "strong", *(["--quality", "ring.toml"] if quality else []),
        "--out", "out", cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["skipped"] == []
    assert [point["workers"] for point in found["points"]] == workers
    for point in found["points"]:
        ratio = point["samples_per_s"] / point["limit_samples_per_s"]
        assert point["efficiency"] == pytest.approx(ratio)
        assert point["efficiency_low"] * 0.9999 <= ratio <= point["efficiency_high"] * 1.0001
        assert (point["mode"], point["global_batch"]) == ("strong", 4)
        assert sum(point["hosts"].values()) == point["workers"]
        assert point["start_s"] > 0
        assert (point["bytes_sent"] > 0) == (point["workers"] > 1)
        if quality:
            assert point["quality"]["samples_seen"] == 640
            assert 0 <= point["quality"]["fid"] <= 8
    assert found["recovery"]["workers"] == 2
    assert found["recovery"]["recovery_s"] > 0
    assert found["recovery"]["elastic_s"] > 0
    assert found["recovery"]["steps_repeated"] == 1
    (host,) = found["hosts"]
    assert host["packages"].keys() == {"gatdist", "torch", "ray"}
    assert json.loads((tmp_path / "out/result.json").read_text()) == found
    for noise in ("Traceback", "WARNING", "ray::"):
        assert noise not in finished.stderr


def test_cluster_without_room_reports_its_resources(run_gatdist, ray_address, tmp_path):
    finished = run_gatdist(
        "bench", "scaling", "--workers", "1,4", "--address", ray_address, *TINY, cwd=tmp_path
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr == (
        "gatdist: --workers = 4: need 4 CPUs, and the cluster has 2. Use --workers 2.\n"
    )


@pytest.mark.slow
def test_without_address_a_local_ray_is_started_and_stopped(run_gatdist, tmp_path):
    finished = run_gatdist(
        "bench", "scaling", "--workers", "1", "--mode", "weak", *TINY, timeout=300, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("dcgan64_w4, alternating, weak: 4 a worker\nworkers")
    assert "Recovery" not in finished.stdout  # a single worker has no peer


@pytest.mark.slow
def test_dead_worker_is_reported_and_its_resources_released(ray_address, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, "-c", "import dies; dies.main()", ray_address]
    finished = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    assert "worker 1 died" in finished.stdout or "lost its connections" in finished.stdout
    assert finished.stdout.endswith(" [0, 1]\n")
    assert finished.stderr == "about to die\n"
