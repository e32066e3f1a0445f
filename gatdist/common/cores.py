"""CPU cores that a process may use: its affinity and the CPU quotas of its control groups."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Of a worker with a GPU: to decode while another core launches the kernels of a step.
CORES_NEEDED = 2
_MAX_DECODE_THREADS = 16  # more would wait for Python's lock


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the smallest CPU quota of this process's control groups, in cores; infinite: none.

    Reads ``/proc`` and ``/sys`` below ``root``.
    """
    limits = [math.inf]
    for folder in _groups(root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if (cores := float(quota) / float(period)) > 0:  # -1: none
                limits.append(cores)
    return min(limits)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process that may limit its CPU time."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = Path(path.lstrip("/"))
            yield from (top / parent for parent in (group, *group.parents))


def decode_threads(cores: float) -> int:
    """Return the number of decoding threads of a worker with a GPU and a share of ``cores``.

    One core is left for the step, since launching its kernels takes one.
    """
    return max(1, min(_MAX_DECODE_THREADS, int(cores) - 1))


def whereabouts(host: str) -> dict[str, Any]:
    """Return what :func:`share_of_cores` needs to know of this process, as JSON values."""
    quota = cpu_quota()
    return {
        "host": host,
        "cores": sorted(os.sched_getaffinity(0)),
        "quota": None if math.isinf(quota) else quota,
    }


def share_of_cores(mine: dict[str, Any], workers: Sequence[dict[str, Any]]) -> float:
    """Return the number of cores of one of the workers, if those of a host share them equally.

    ``workers`` are the :func:`whereabouts` of all, ``mine`` included.
    """
    neighbors = [worker for worker in workers if worker["host"] == mine["host"]]
    users = Counter(core for worker in neighbors for core in worker["cores"])
    share = sum(1 / users[core] for core in mine["cores"])
    quota = math.inf if mine["quota"] is None else mine["quota"] / len(neighbors)
    return min(share, quota)
