"""Cores that a process may use, and their division among the workers of a host."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gatdist.cluster.doctor.local import assess_cores
from gatdist.common.cores import (
    cpu_quota,
    decode_threads,
    share_of_cores,
    usable_cores,
    whereabouts,
)


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Write ``/proc/self/cgroup`` and files of ``/sys/fs/cgroup`` below ``root``."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        (
            "0::/a/b\n",  # the smallest of its parents applies
            {
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
            },
            3,
        ),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
            {
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        ("nonsense", {}, math.inf),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    assert cpu_quota(system(tmp_path, groups, files)) == expected


def test_this_process_uses_at_least_one_core() -> None:
    mine = whereabouts("host")
    assert 1 <= usable_cores() <= len(mine["cores"])
    assert share_of_cores(mine, [mine]) >= 1


def worker(host: str, cores: range, quota: float | None = None) -> dict[str, Any]:
    return {"host": host, "cores": list(cores), "quota": quota}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        # Ray and torchrun: all may use all cores.
        ([worker("a", range(64))] * 8, 8),
        ([worker("a", range(64))] * 4 + [worker("b", range(64))] * 8, 16),
        # srun: each has its own.
        ([worker("a", range(8 * i, 8 * i + 8)) for i in range(8)], 8),
        # Two halves of a host, each shared by two.
        ([worker("a", range(8))] * 2 + [worker("a", range(8, 16))] * 2, 4),
        # A container with a quota.
        ([worker("a", range(64), quota=20.0)] * 8, 2.5),
    ],
)
def test_workers_of_a_host_share_its_cores(workers: list[dict[str, Any]], expected: float) -> None:
    assert share_of_cores(workers[0], workers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cores", "threads"), [(0.2, 1), (1, 1), (2, 1), (3.9, 2), (8, 7), (64, 16)]
)
def test_one_core_is_left_for_the_step(cores: float, threads: int) -> None:
    assert decode_threads(cores) == threads


def test_doctor_reports_too_few_cores_for_the_gpus() -> None:
    assert assess_cores(8, 8, gpus=0).ok
    assert assess_cores(64, 64, gpus=8).ok
    few = assess_cores(8, 64, gpus=8)
    assert few.ok is None
    assert few.hint
