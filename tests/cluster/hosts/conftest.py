"""A head and two workers, each on its own host, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host_runs import Runs, need_hosts

from benchmarks.hosts import Hosts


@pytest.fixture(scope="session")
def own_hosts() -> Iterator[Hosts]:
    """The hosts; see ``hosts``."""
    need_hosts()
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(own_hosts: Hosts) -> Iterator[Hosts]:
    """Head and two workers with a CPU each, all alive; repaired after each test."""
    yield own_hosts
    for host in own_hosts.workers:
        host.plug()
        host.slow(None)
    for host in own_hosts.workers:
        if host.name not in own_hosts.alive():
            host.kill()
            own_hosts.join(host)
    own_hosts.wait_for(len(own_hosts.workers) + 1)


@pytest.fixture
def runs(hosts: Hosts, tmp_path: Path) -> Iterator[Runs]:
    """Starts runs on the hosts, and stops them."""
    with Runs(hosts, tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def undisturbed(own_hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an uninterrupted run of two workers."""
    with Runs(own_hosts, tmp_path_factory.mktemp("undisturbed")) as runs:
        runs.start()
        assert runs.finish() == 0, runs.errors
        return runs.digest()
