"""The doctor's findings from given facts, and its measurements on this machine."""

from __future__ import annotations

import json
import os
import re
from contextlib import closing
from pathlib import Path

import pytest

from gatdist.cli import main
from gatdist.cluster.doctor import assess, local, network, storage
from gatdist.cluster.doctor.report import Exchange, Finding, HostReport, Report, described
from gatdist.cluster.preflight import HostInfo, faults, require_compatible
from gatdist.common.errors import ClusterError
from support import refused

ADDRESSES = {"10.0.0.1": "a", "10.0.0.2": "b", "10.0.0.3": "c"}
GB = 10**9


def host_info(
    host: str,
    clock_s: float = 0.0,
    device: str = "",
    folder: str = "",
    gpu: str = "",
    **versions: str,
):
    address = next(address for address, name in ADDRESSES.items() if name == host)
    return HostInfo(
        host, address, {"Python": "3.11", "torch": "2.8"} | versions, clock_s, device, folder, gpu
    )


def test_odd_one_out_is_named_wherever_it_is():
    for odd in "abc":
        found = [host_info(name, torch="2.9" if name == odd else "2.8") for name in "abc"]
        (fault,) = faults(found, 0.0)
        assert (fault.host.host, fault.about) == (odd, "versions")
        own, all_ = assess.versions(found)
        assert [finding.ok for finding in own.values()] == [False]
        assert "torch 2.9" in own[fault.host.address].value
        for fact in (odd, "Python 3.11", "torch 2.8"):
            assert fact in all_.value
    own, all_ = assess.versions([host_info(name) for name in "abc"])
    assert not own
    assert (all_.name, all_.ok) == ("versions", True)
    assert "Python 3.11, torch 2.8" in all_.value


def test_workers_are_rejected_for_the_first_fault():
    require_compatible([host_info("a", 100.0), host_info("b", 399.0)], 100.0)
    with refused(ClusterError, "host b (10.0.0.2)"):
        require_compatible([host_info("a", 100.0), host_info("b", 401.0)], 100.0)
    with refused(ClusterError, "host b (10.0.0.2)"):
        require_compatible([host_info("a"), host_info("b", folder="gone")], 0.0)
    with refused(ClusterError, "host a (10.0.0.1)"):
        require_compatible([host_info("a", device="CUDA error"), host_info("b")], 0.0)


def test_different_gpus_are_a_warning_or_for_canonical_runs_an_error():
    old, new = "A100, 80 GiB, compute capability 8.0", "H100, 80 GiB, compute capability 9.0"
    same = [host_info(name, gpu=new) for name in "abc"]
    assert require_compatible(same, 0.0, exact=True) == []
    mixed = [host_info("a", gpu=new), host_info("b", gpu=old), host_info("c", gpu=new)]
    (warning,) = require_compatible(mixed, 0.0)
    assert f"{old} (on b)" in warning
    assert f"{new} (on a, c)" in warning
    with refused(ClusterError, "GPUs"):
        require_compatible(mixed, 0.0, exact=True)


@pytest.mark.parametrize(
    ("ahead_s", "ok", "message"),
    [
        (0.0004, True, "400 µs ahead"),
        (-0.02, True, "20 ms behind"),
        (2.0, None, "2 s ahead"),
        (-301.0, False, "301 s behind"),
    ],
)
def test_clocks(ahead_s, ok, message):
    found = assess.clock(ahead_s, 0.001)
    assert found.ok == ok
    assert found.value.startswith(message)
    assert found.value.endswith("± 500 µs")
    assert bool(found.hint) == (ok is not True)


def test_clock_is_read_halfway_through_the_request():
    assert assess.round_trip(100.0, 111.0, 102.0) == (2.0, 10.0)


def test_all_connections():
    (found,) = assess.reach(ADDRESSES, {})
    assert (found.name, found.ok) == ("connections", True)


def test_pair_without_a_connection_is_named_with_its_direction():
    one_way = {("10.0.0.1", "10.0.0.3"): "timed out"}
    (found,) = assess.reach(ADDRESSES, one_way)
    assert re.fullmatch(r"a \(10.0.0.1\) .* c \(10.0.0.3\) \(timed out\)", found.value)
    (found,) = assess.reach(ADDRESSES, {("10.0.0.3", "10.0.0.1"): "timed out"})
    assert re.fullmatch(r"c \(10.0.0.3\) .* a \(10.0.0.1\) \(timed out\)", found.value)
    (found,) = assess.reach(ADDRESSES, one_way | {("10.0.0.3", "10.0.0.1"): "timed out"})
    assert re.fullmatch(r"a \(10.0.0.1\) .* c \(10.0.0.3\) .*\(timed out\)", found.value)
    assert found.ok is False


def test_unreachable_host_is_named_once():
    failed = {("10.0.0.1", "10.0.0.2"): "timed out", ("10.0.0.3", "10.0.0.2"): "timed out"}
    (found,) = assess.reach(ADDRESSES, failed)
    assert re.fullmatch(r"b \(10.0.0.2\) .*\(timed out\)", found.value)


def test_of_two_hosts_the_pair_is_named():
    two = {"10.0.0.1": "a", "10.0.0.2": "b"}
    (found,) = assess.reach(two, {("10.0.0.1", "10.0.0.2"): "refused"})
    assert re.fullmatch(r"a \(10.0.0.1\) .* b \(10.0.0.2\) \(refused\)", found.value)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_no_host_sends_and_receives_in_the_same_round(count: int):
    addresses = [f"10.0.0.{n}" for n in range(count)]
    to = network.neighbours(addresses)
    turns = network.turns(addresses)
    assert sorted(one for turn in turns for one in turn) == addresses
    assert len(turns) == 2 + count % 2
    for turn in turns:
        assert not set(turn) & {to[one] for one in turn}


def test_slow_link_is_named():
    to = network.neighbours(list(ADDRESSES))
    assert to == {"10.0.0.1": "10.0.0.2", "10.0.0.2": "10.0.0.3", "10.0.0.3": "10.0.0.1"}
    rates = {"10.0.0.1": 9e8, "10.0.0.2": 2.5e6, "10.0.0.3": 8e8}
    found = assess.sending(ADDRESSES, {one: (to[one], rates[one]) for one in ADDRESSES})
    assert [found[one].ok for one in ADDRESSES] == [True, None, True]
    assert found["10.0.0.2"].value.startswith("2.5 MB/s to c")
    assert "b to c" in found["10.0.0.2"].hint


def test_gpus_on_some_hosts_only():
    assert assess.devices([], ["a", "b"]) is None
    assert assess.devices(["a", "b"], []) is None
    mixed = assess.devices(["a"], ["b"])
    assert mixed is not None
    assert mixed.ok is None
    assert re.search(r"\ba\b.*\bb\b", mixed.value)


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        (local.assess_memory(3 * GB, 8 * GB), True),
        (local.assess_memory(1 * GB, 8 * GB), False),
        (local.assess_shared_memory(GB), True),
        (local.assess_shared_memory(64_000_000), False),
        (local.assess_shared_memory(None), False),
        (local.assess_disk("disk", "/data", 3 * GB, True), True),
        (local.assess_disk("disk", "/data", 1 * GB, True), False),
        (local.assess_disk("disk", "/data", 3 * GB, False), False),
        (local.assess_device("1 × H100", True, ""), True),
        (local.assess_device("1 × H100", True, "CUDA error: no kernel"), False),
        (local.assess_device("", True, ""), False),
        (local.assess_device("", False, ""), True),
        (local.assess_interface("eth0", "10.0.0.1", "127.0.1.1"), True),
        (local.assess_interface("lo", "127.0.0.1", "127.0.0.1"), None),
        (local.assess_interface(None, "10.0.0.9", "10.0.0.1"), False),
        (storage.assess(storage.StorageInfo("", 8_000_000, 0.5, 0.1), "s3://b"), True),
        (storage.assess(storage.StorageInfo("not permitted"), "s3://b"), False),
    ],
)
def test_thresholds(found, ok):
    assert found.ok is ok
    assert bool(found.hint) == (ok is not True)


def test_report_as_text_and_as_json():
    bad = Finding("storage", "not permitted", False, "Give it credentials")
    good = Finding("clock", "1 ms ahead", True)
    exchange = Exchange(4000, 0.0002, 2e7)
    report = Report([Finding("hosts", "1 of 1 answered", True)], [
        HostReport("w1", "10.0.0.2", [good, bad]),
    ], [exchange])  # fmt: skip
    text = described(report)
    assert "w1 (10.0.0.2)\n  ok  clock    1 ms ahead\n BAD  storage  not permitted" in text
    assert "→ Give it credentials" in text
    assert "4 kB" in text
    assert report.bad == ["w1 storage"]
    found = report.to_json()
    assert found["ok"] is False
    assert found["hosts"][0]["findings"][1]["hint"] == "Give it credentials"
    assert found["network"] == [exchange._asdict()]
    json.dumps(found)


def test_listener_is_reached_and_a_closed_port_is_not():
    with closing(network.Listener("127.0.0.1")) as listener:
        target = {"127.0.0.1": listener.port}
        assert network.failures(target) == {}
        assert network.sending_rate("127.0.0.1", listener.port) > 1e6
    assert network.failures(target) == {"127.0.0.1": "Connection refused"}


def test_storage_is_tested_from_here_and_nothing_is_left(tmp_path: Path, capsys):
    folder = tmp_path / "new" / "runs"
    main(["doctor", "--json", "--storage", str(folder)])
    found = json.loads(capsys.readouterr().out)
    (finding,) = [one for one in found["findings"] if one["name"] == "storage"]
    assert finding["ok"], finding
    assert "MB/s up" in finding["value"]
    assert str(folder) in finding["value"]
    assert os.listdir(folder) == []


def test_folder_that_another_process_does_not_see_is_reported(tmp_path: Path):
    with storage.marker(str(tmp_path / "a"), {}) as marker:
        assert storage.look(marker).error == ""
        (elsewhere := tmp_path / "b").mkdir()
        found = storage.look(marker._replace(url=str(elsewhere)))
        assert found.error
    assert os.listdir(tmp_path / "a") == os.listdir(elsewhere) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage", "nowhere://bucket"], "nowhere://bucket"),
        (["--storage", "/proc/nowhere"], "/proc/nowhere"),
        (["--storage", "here", "--storage-option", "anon"], "--storage-option"),
        (["--address", "127.0.0.1:1"], "cluster.address = '127.0.0.1:1': "),
        (["--timeout", "0"], "--timeout = 0.0: "),
    ],
)
def test_bad_input_gives_one_message(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("wait_s", "ok"),
    [(None, None), ("", None), ("3", None), ("soon", None), ("59", None), ("60", True)],
)
def test_short_wait_of_ray_job_stop_is_reported(wait_s, ok):
    found = assess.job_stop(wait_s)
    assert found.ok is ok
    assert ("RAY_JOB_STOP_WAIT_TIME_S" in found.hint) is (ok is None)
