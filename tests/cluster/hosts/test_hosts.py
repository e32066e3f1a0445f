"""Test of the hosts themselves."""

import pytest

from benchmarks.hosts import Hosts

pytestmark = pytest.mark.hosts


def test_one_process_can_create_several_sets_of_hosts(hosts: Hosts) -> None:
    with Hosts(1, ray=False) as others:
        assert others.head.processes() == []
        process = others.head.start("hostname", stdout=-1)
        assert process.communicate(timeout=20)[0] == "head\n"
    assert hosts.head.processes()
