"""Every file that starts a head lets `ray job stop` wait for a run's last checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
STARTS_A_HEAD = re.compile(
    r"ray start .*--head|place=\"--head|symmetric-run|name: ray-head\n +image: IMAGE|^FROM ", re.M
)
WAIT = re.compile(r"RAY_JOB_STOP_WAIT_TIME_S(?:=|, value: \")(\d+)")
FILES = [
    path
    for path in sorted(DEPLOY.rglob("*"))
    if (path.suffix in (".yaml", ".sbatch") or path.name == "Dockerfile")
    and STARTS_A_HEAD.search(path.read_text())
    and "kustomize.config.k8s.io" not in path.read_text()
]


def test_some_files_start_a_head():
    assert len(FILES) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_job_stop_waits_for_a_checkpoint(path):
    (seconds,) = WAIT.findall(path.read_text())
    assert int(seconds) >= 60
