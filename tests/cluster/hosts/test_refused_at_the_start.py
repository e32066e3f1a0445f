"""Mismatched hosts are reported, with host and hint, before the first step."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host_runs import Runs

import gatdist
from benchmarks.hosts import Host

pytestmark = pytest.mark.hosts

PACKAGE = Path(gatdist.__file__).parent


@contextmanager
def replaced(runs: Runs, host: Host, path: Path, instead: Path) -> Iterator[None]:
    """Replace a path on one host with something else."""
    host.disguises[path] = instead
    try:
        restart(runs, host)
        yield
    finally:
        host.disguises.clear()
        restart(runs, host)


def restart(runs: Runs, host: Host) -> None:
    host.kill()
    runs.hosts.wait_for(len(runs.hosts.workers))
    runs.hosts.join(host)
    runs.hosts.wait_for(len(runs.hosts.workers) + 1)


def rejection(runs: Runs, *settings: str) -> str:
    """Return the message of a command that must be rejected."""
    runs.start(*settings)
    assert runs.finish(300) == 2, runs.errors
    assert "Traceback" not in runs.errors
    assert runs.attempts() == []
    assert runs.committed() == []
    return runs.errors


def test_other_version_on_one_host_is_rejected(runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "version.py"
    other.write_text('__version__ = "9.9.9"\n')
    host, usual = runs.hosts.workers[1], runs.hosts.workers[0]
    with replaced(runs, host, PACKAGE / "common" / "version.py", other):
        errors = rejection(runs)
    assert "9.9.9" in errors
    assert gatdist.__version__ in errors
    # Of two hosts, either may be named as the odd one.
    assert any(f"host {one.name} ({one.address}): " in errors for one in (host, usual))


def test_run_directory_that_one_host_does_not_share_is_rejected(runs: Runs, tmp_path: Path) -> None:
    runs.run_dir.mkdir()
    (tmp_path / "elsewhere").mkdir()
    host = runs.hosts.workers[0]
    with replaced(runs, host, runs.run_dir, tmp_path / "elsewhere"):
        errors = rejection(runs)
    assert f"host {host.name} ({host.address}): " in errors
    assert str(runs.run_dir) in errors


def test_hosts_that_cannot_reach_each_other_are_rejected(runs: Runs) -> None:
    one, other = runs.hosts.workers
    route = ["ip", "-n", one.namespace, "route"]
    subprocess.run([*route, "add", "prohibit", f"{other.address}/32"], check=True)
    try:
        # The process group's own timeout follows it.
        errors = rejection(runs, "cluster.heartbeat_timeout_s=8")
    finally:
        subprocess.run([*route, "del", "prohibit", f"{other.address}/32"], check=True)
    assert f"w1 ({one.address})" in errors
    assert f"w2 ({other.address})" in errors
