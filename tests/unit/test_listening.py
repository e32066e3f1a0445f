"""Servers that gatdist starts listen on loopback only."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.proxy import Proxy
from benchmarks.servers import nginx
from support import PROGRAMS, need

LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def listening(port: int) -> set[str]:
    """Return the addresses that are listened on at a port, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, number = fields[1].rpartition(":")
            if fields[3] == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_proxy_listens_on_loopback_only() -> None:
    with Proxy("http://127.0.0.1:9") as proxy:
        assert listening(port_of(proxy.url)) <= LOOPBACK
        assert listening(port_of(proxy.url))


def test_store_of_the_benchmark_listens_on_loopback_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("nginx")
    monkeypatch.setenv("PATH", PROGRAMS)
    with nginx(tmp_path) as address:
        assert listening(port_of(address)) <= LOOPBACK
        assert listening(port_of(address))
