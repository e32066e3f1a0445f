"""The doctor on real hosts: without faults, and with each fault that it must find."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import Host, Hosts
from support import end_group, wait_until

pytestmark = pytest.mark.hosts

# Port of a server on the head's host, so that a host can be cut off from it and not from Ray.
SERVER = "10.99.0.100"
MAKE_BUCKET = """
import sys, time, urllib.request
request = urllib.request.Request(sys.argv[1], method="PUT")
for _ in range(300):
    try:
        urllib.request.urlopen(request, timeout=5).close()
        break
    except OSError:
        time.sleep(0.2)
else:
    sys.exit("no answer")
"""


def doctor(hosts: Hosts, folder: Path, *args: str) -> tuple[int, str, str]:
    """Run the doctor on the head; return its status, output and errors."""
    process = hosts.head.start(
        sys.executable, "-m", "gatdist", "doctor", "--address", hosts.head.ray_address, *args,
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        end_group(process)
    assert "Traceback" not in errors
    return process.returncode, output, errors


def findings(found: dict[str, Any], host: str = "") -> dict[str, dict[str, Any]]:
    """Return findings by name, of a host or of all."""
    where = next(h for h in found["hosts"] if h["name"] == host) if host else found
    return {finding["name"]: finding for finding in where["findings"]}


def bad(found: dict[str, Any]) -> set[tuple[str, str]]:
    """Return host (or "") and name of each failed check."""
    return {
        (host, name)
        for host in ("", *(h["name"] for h in found["hosts"]))
        for name, finding in findings(found, host).items()
        if finding["ok"] is False
    }


@contextmanager
def blackhole(host: Host, address: str) -> Iterator[None]:
    """Drop all packets of the host to an address."""
    route = ["blackhole", address]
    command = ["ip", "-n", host.namespace, "route"]
    subprocess.run([*command, "add", *route], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, "del", *route], check=True)


@pytest.fixture(scope="module")
def bucket(own_hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options of the doctor for a bucket of an S3 server on the head's host."""
    head = own_hosts.head
    address = ["addr", "add", f"{SERVER}/24", "dev", "eth0"]
    subprocess.run(["ip", "-n", head.namespace, *address], check=True)
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        server = head.start(
            sys.executable, "-m", "moto.server", "-H", SERVER, "-p", "5000", stdout=log, stderr=log
        )
        try:
            url = f"http://{SERVER}:5000"
            assert head.start(sys.executable, "-c", MAKE_BUCKET, f"{url}/runs").wait(90) == 0
            options = [f'client_kwargs={{endpoint_url="{url}"}}', "key=test", "secret=test"]
            sets = [word for option in options for word in ("--storage-option", option)]
            yield ["--storage", "s3://runs/one", *sets]
        finally:
            end_group(server)
    address[1] = "del"
    subprocess.run(["ip", "-n", head.namespace, *address], check=True)


def test_no_faults_pass(hosts: Hosts, tmp_path: Path, bucket: list[str]) -> None:
    status, output, errors = doctor(hosts, tmp_path, "--json", *bucket)
    found = json.loads(output)
    assert status == 0, (output, errors)
    assert found["ok"]
    assert [(h["name"], h["address"]) for h in found["hosts"]] == [
        (host.name, host.address) for host in (hosts.head, *hosts.workers)
    ]
    for host in (hosts.head, *hosts.workers):
        own = findings(found, host.name)
        assert own["interface"]["value"].startswith(f"eth0 ({host.address}; the host's name leads")
        assert own["clock"]["ok"]
        assert "MB/s up" in own["storage"]["value"]
        assert {"Python", "torch", "Ray", "gatdist", "device", "cores", "memory"} <= own.keys()
        assert {"/dev/shm", "disk (Ray)"} <= own.keys()
    assert findings(found)["versions"]["value"].startswith("the same on all: Python 3")
    assert findings(found)["connections"]["value"] == "w1 and w2 reach one another"
    assert [one["bytes"] for one in found["network"]] == [4_000, 64_000, 1_000_000, 16_000_000]
    seconds = [one["seconds"] for one in found["network"]]
    assert 0 < seconds[0] < seconds[-1]
    assert all(one["bandwidth_bytes_per_s"] > 0 for one in found["network"])


def test_two_hosts_that_reach_the_head_but_not_each_other(hosts: Hosts, tmp_path: Path) -> None:
    w1, w2 = hosts.workers
    with blackhole(w1, w2.address):
        status, output, errors = doctor(hosts, tmp_path)
    assert status == 2
    assert any(w1.address in line and w2.address in line for line in output.splitlines()), output
    assert "connections" in errors
    assert "3 of 3" in output
    assert "all-reduce" not in output


def test_storage_that_one_host_cannot_reach(
    hosts: Hosts, tmp_path: Path, bucket: list[str]
) -> None:
    with blackhole(hosts.workers[1], SERVER):
        status, output, errors = doctor(hosts, tmp_path, "--json", *bucket)
    assert status == 2
    found = json.loads(output)
    assert bad(found) == {("w2", "storage")}, output
    assert "w2 storage" in errors
    assert found["network"]  # the other checks ran nevertheless


@pytest.mark.slow
def test_path_that_is_another_folder_on_one_host(hosts: Hosts, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    # In the host's mount namespace only, another disk is mounted on the folder.
    (raylet,) = [p for p in hosts.workers[0].processes() if program(p).endswith("/raylet")]
    enter = ["nsenter", "--target", str(raylet), "--mount"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(shared)], check=True)
    try:
        status, output, _ = doctor(hosts, tmp_path, "--json", "--storage", "shared")
    finally:
        subprocess.run([*enter, "umount", str(shared)], check=True)
    assert status == 2
    found = json.loads(output)
    assert bad(found) == {("w1", "storage")}, output
    assert "is another folder there" in findings(found, "w1")["storage"]["value"]
    assert list(shared.iterdir()) == []


@pytest.mark.slow
def test_slow_link_shows_in_the_bandwidth(hosts: Hosts, tmp_path: Path) -> None:
    hosts.workers[1].slow(20)
    status, output, errors = doctor(hosts, tmp_path, "--json")
    assert status == 0, errors  # slow, but not a failure
    found = json.loads(output)
    slow = findings(found, "w2")["sends"]
    assert slow["ok"] is None
    assert "link from w2 to w1" in slow["hint"]
    assert findings(found, "w1")["sends"]["ok"]
    assert found["network"][2]["bytes"] == 1_000_000
    assert 1e5 < found["network"][2]["bandwidth_bytes_per_s"] < 20e6 / 8


def test_unresponsive_host(hosts: Hosts, tmp_path: Path) -> None:
    """The agent that starts actors is frozen; Ray considers the host alive."""
    agents = [p for p in hosts.workers[1].processes() if "RuntimeEnvAgent" in program(p)]
    assert agents
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)
    try:
        status, output, errors = doctor(hosts, tmp_path, "--json", "--timeout", "25")
    finally:
        for agent in agents:
            os.kill(agent, signal.SIGCONT)
    assert status == 2
    found = json.loads(output)
    assert bad(found) == {("", "hosts"), ("w2", "answers")}, output
    assert "25 s" in findings(found, "w2")["answers"]["value"]
    assert findings(found, "w1")["clock"]["ok"]
    assert "2 of 3" in findings(found)["hosts"]["value"]
    assert "w2 answers" in errors


def test_lost_host(hosts: Hosts, tmp_path: Path) -> None:
    hosts.workers[1].kill()
    wait_until(lambda: "w2" not in hosts.alive(), "Ray to miss it", timeout_s=300)
    status, output, errors = doctor(hosts, tmp_path)
    assert status == 0, errors
    assert f"w2 ({hosts.workers[1].address})" in output
    assert "all-reduce" not in output


@pytest.mark.slow
def test_process_group_that_cannot_connect(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use an interface that leads nowhere; TCP works nevertheless."""
    for host in hosts.workers:
        monkeypatch.setitem(host._environment, "GLOO_SOCKET_IFNAME", "lo")
        host.kill()
    hosts.wait_for(1)
    for host in hosts.workers:
        hosts.join(host)
    hosts.wait_for(3)
    status, output, _ = doctor(hosts, tmp_path, "--json")
    for host in hosts.workers:
        host.kill()  # so that the next test starts without it
    hosts.wait_for(1)
    assert status == 2
    found = json.loads(output)
    assert bad(found) == {("", "all-reduce")}, output
    assert "gloo, 2 hosts: failed" in findings(found)["all-reduce"]["value"]
    assert "unset GLOO_SOCKET_IFNAME" in findings(found)["all-reduce"]["hint"]
    assert findings(found)["connections"]["ok"]


def program(process: int) -> str:
    """Return a process's command or title: its first word."""
    return Path(f"/proc/{process}/cmdline").read_text().split("\0")[0]
