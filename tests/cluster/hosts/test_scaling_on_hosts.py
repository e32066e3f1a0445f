"""``gatdist bench scaling`` on several hosts: bytes sent, and the cost of a slow network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import Hosts
from support import end_group

pytestmark = pytest.mark.hosts


def scale(hosts: Hosts, folder: Path, *more: object) -> dict[str, Any]:
    process = hosts.head.start(
        sys.executable, "-m", "gatdist", "bench", "scaling", "--workers", "1,2", "--json",
        "--address", hosts.head.ray_address, "--mode", "weak", "--batch", "8", "--rounds", "2",
        *more, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        end_group(process)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.mark.slow
def test_bytes_and_recovery_on_two_hosts_and_a_slow_link(hosts: Hosts, tmp_path: Path) -> None:
    fast = scale(hosts, tmp_path, "--run-dir", tmp_path / "runs")
    single, both = fast["points"]
    assert set(both["hosts"]) == {"w1", "w2"}
    assert single["bytes_measured"] is None
    # In addition to gradients: headers, acknowledgements, and Ray's own traffic.
    assert 0.95 < both["bytes_measured"] / both["bytes_sent"] < 1.2
    assert [host["host"] for host in fast["hosts"]] == ["w1", "w2"]
    assert fast["skipped"] == []
    assert fast["recovery"]["workers"] == 2
    for host in hosts.workers:
        host.slow(100)
    slow = scale(hosts, tmp_path)
    assert slow["points"][1]["efficiency"] < 0.7 * both["efficiency"]
    (skipped,) = slow["skipped"]
    assert skipped["what"] == "recovery"
    assert "--run-dir: is needed on several hosts" in skipped["reason"]
    assert slow["recovery"] is None
