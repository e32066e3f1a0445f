"""Hosts that do not fit together are told, with host and hint, before a step is made."""

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
def disguised(runs: Runs, host: Host, path: Path, instead: Path) -> Iterator[None]:
    """On one host, something else is found at a path."""
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


def refused(runs: Runs, *settings: str) -> str:
    """What the command says that is refused."""
    runs.start(*settings)
    assert runs.finish(300) == 2, runs.errors
    assert "Traceback" not in runs.errors
    assert runs.attempts() == []
    assert runs.committed() == []
    return runs.errors


def test_another_version_on_one_host(runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "version.py"
    other.write_text('__version__ = "9.9.9"\n')
    host, usual = runs.hosts.workers[1], runs.hosts.workers[0]
    with disguised(runs, host, PACKAGE / "common" / "version.py", other):
        errors = refused(runs)
    assert "9.9.9" in errors
    assert gatdist.__version__ in errors
    # Either is the odd one out of two.
    assert any(f"host {one.name} ({one.address}): " in errors for one in (host, usual))


def test_a_run_directory_that_one_host_does_not_share(runs: Runs, tmp_path: Path) -> None:
    runs.run_dir.mkdir()
    (tmp_path / "elsewhere").mkdir()
    host = runs.hosts.workers[0]
    with disguised(runs, host, runs.run_dir, tmp_path / "elsewhere"):
        errors = refused(runs)
    assert f"host {host.name} ({host.address}): " in errors
    assert str(runs.run_dir) in errors


def test_hosts_that_can_t_reach_one_another(runs: Runs) -> None:
    one, other = runs.hosts.workers
    route = ["ip", "-n", one.namespace, "route"]
    subprocess.run([*route, "add", "prohibit", f"{other.address}/32"], check=True)
    try:
        # By which the process group's own limit goes.
        errors = refused(runs, "cluster.heartbeat_timeout_s=8")
    finally:
        subprocess.run([*route, "del", "prohibit", f"{other.address}/32"], check=True)
    assert f"w1 ({one.address}), w2 ({other.address})" in errors
