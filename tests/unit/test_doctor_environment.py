"""The doctor's checks of the environment: temporary folder, limits, proxies, interfaces, GPUs."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gatdist.cluster.doctor import environment, local

GB = 10**9
# Output of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`, in the order of `Gpu`.
WELL = "0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, Default, Disabled, 0"
OLD = "1, Tesla K80, 470.57.02, 11441, 0, Default, [N/A], [Not Supported]"


def doctor(*args: str, env: Mapping[str, str] | None = None, before: Any = None) -> tuple[int, Any]:
    """Return exit status and findings of ``gatdist doctor --json`` in a child process."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    finished = subprocess.run(
        [sys.executable, "-m", "gatdist", "doctor", "--json", *args],
        env=clean | dict(env or {}),
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in finished.stderr, finished.stderr
    found = json.loads(finished.stdout)["findings"]
    return finished.returncode, {finding["name"]: finding for finding in found}


def require_only(found: tuple[int, Any], name: str) -> dict[str, Any]:
    """Assert that only the finding of that name fails, with a hint and status 2; return it."""
    status, findings = found
    assert {each for each, finding in findings.items() if finding["ok"] is False} == {name}
    assert status == 2
    finding: dict[str, Any] = findings[name]
    assert finding["hint"]
    return finding


def test_doctor_reports_a_tmpdir_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    finding = require_only(doctor(env={"TMPDIR": str(long)}), "temporary folder")
    assert "107" in finding["value"]
    assert "TMPDIR" in finding["hint"]


def test_doctor_reports_a_ray_tmpdir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = doctor(env={"RAY_TMPDIR": str(tmp_path / "file")})
    assert "RAY_TMPDIR" in require_only(found, "temporary folder")["hint"]


def test_doctor_reports_a_low_limit_of_open_files() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    finding = require_only(doctor(before=lower), "open files")
    assert finding["value"] == "512"
    assert "ulimit -n" in finding["hint"]


def test_doctor_reports_an_interface_that_does_not_exist() -> None:
    found = doctor(env={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert "nosuch0" in require_only(found, "chosen interface")["value"]


def test_doctor_reports_a_cache_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = doctor(env={"GATDIST_CACHE": str(tmp_path / "file" / "cache")})
    require_only(found, "disk (cache)")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("options", ["size=64k", "size=3g,nr_inodes=50"])
def test_doctor_reports_a_full_disk_or_no_free_inodes_of_the_run(
    tmp_path: Path, options: str
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", folder], check=True)
    try:
        _, findings = doctor("--storage", str(folder / "runs/a"))
    finally:
        subprocess.run(["umount", folder], check=True)
    assert findings["disk (run)"]["ok"] is False
    assert findings["disk (run)"]["hint"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_doctor_reports_shared_memory_that_is_small_or_read_only() -> None:
    for options in ("size=64m", "size=1g,ro"):
        script = f"mount -t tmpfs -o {options} shm /dev/shm && exec {sys.executable} -m gatdist"
        finished = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{script} doctor --json"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        found = {one["name"]: one for one in json.loads(finished.stdout)["findings"]}
        assert found["/dev/shm"]["ok"] is False
        assert found["/dev/shm"]["hint"]
        assert finished.returncode == 2


@pytest.mark.parametrize(
    ("variables", "ok"),
    [
        ({}, True),
        ({"http_proxy": ""}, True),
        ({"http_proxy": "http://proxy:3128"}, False),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, False),
        ({"grpc_proxy": "http://proxy:3128", "no_proxy": "10.0.0.1"}, False),
        ({"all_proxy": "socks5://proxy", "no_proxy": "127.0.0.1,10.0.0.1"}, False),
        ({"http_proxy": "http://p", "no_proxy": "127.0.0.1, 10.0.0.1 ,10.0.0.2"}, True),
        ({"http_proxy": "http://p", "no_proxy": "127.0.0.0/8,10.0.0.0/8"}, True),
        ({"http_proxy": "http://p", "no_proxy": "127.0.0.0/8,10.0.0.0/31"}, False),
        ({"https_proxy": "http://p", "NO_PROXY": "*"}, True),
        ({"https_proxy": "http://p", "NO_PROXY": "127.0.0.1,not/a/network"}, False),
    ],
)
def test_doctor_proxies_must_exclude_the_cluster(variables: dict[str, str], ok: bool) -> None:
    found = environment.assess_proxies(variables, ["10.0.0.1", "10.0.0.2"])
    assert found.ok is (True if ok else None)
    assert bool(found.hint) is not ok
    ray_uses_them = variables | {"RAY_grpc_enable_http_proxy": "1"}
    assert environment.assess_proxies(ray_uses_them, ["10.0.0.1", "10.0.0.2"]).ok is ok
    assert "://" not in found.value + found.hint  # a proxy's URL may contain a password


@pytest.mark.parametrize(
    ("soft", "hard", "ok"),
    [(1024, 4096, True), (1023, 4096, False), (256, 256, False), (-1, -1, True), (20, -1, False)],
)
def test_doctor_open_files_limits(soft: int, hard: int, ok: bool) -> None:
    found = environment.assess_open_files(soft, hard)
    assert found.ok is ok
    assert bool(found.hint) is not ok


@pytest.mark.parametrize(
    ("user", "container", "ok"),
    [(None, None, True), (4096, None, True), (None, 100, False), (100, 9999, False)],
)
def test_doctor_process_limits(user: int | None, container: int | None, ok: bool) -> None:
    assert environment.assess_processes(user, container).ok is ok


@pytest.mark.parametrize(
    ("folder", "error", "mode", "ok"),
    [
        ("/tmp", "", 0o41777, True),
        ("/home/me/tmp", "", 0o40700, True),
        ("/tmp", "", 0o40777, None),
        ("/tmp", "Operation not permitted", 0, False),
        ("", "No usable temporary directory", 0, False),
    ],
)
def test_doctor_temporary_folders(folder: str, error: str, mode: int, ok: bool | None) -> None:
    found = environment.assess_temporary_folder(folder, error, mode)
    assert found.ok is ok
    assert bool(found.hint) is (ok is not True)


@pytest.mark.parametrize(
    ("chosen", "ok"),
    [
        ({}, True),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, True),
        ({"GLOO_SOCKET_IFNAME": "eth0,lo"}, True),
        ({"GLOO_SOCKET_IFNAME": "eth"}, False),
        ({"NCCL_SOCKET_IFNAME": "eth"}, True),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, False),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, True),
        ({"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "lo"}, False),
    ],
)
def test_doctor_chosen_interfaces(chosen: dict[str, str], ok: bool) -> None:
    assert environment.assess_chosen_interfaces(chosen, ["lo", "eth0"]).ok is ok


def scores(line: str, **others: Any) -> dict[str, bool | None]:
    given = {"num_visible": 1, "failed": {}} | others
    found = environment.assess_gpus(environment.parsed_gpus(line), **given)
    assert all(finding.hint for finding in found)
    return {finding.value: finding.ok for finding in found}


def test_doctor_parses_nvidia_smi() -> None:
    noise = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    well, old = environment.parsed_gpus(f"{noise}\n{WELL}\n{OLD}\nx, y\n")
    assert (well.number, well.name, well.driver) == ("0", "NVIDIA H100 80GB HBM3", "550.54.15")
    assert (well.memory_mb, well.used_mb, well.compute_mode) == ("81559", "4", "Default")
    assert (old.mig, old.ecc_errors) == ("", "")
    assert environment.parsed_gpus("") == []
    assert scores(WELL) == scores(OLD) == {}


@pytest.mark.parametrize(
    ("line", "fact", "ok"),
    [
        (WELL.replace("Default", "Prohibited"), "Prohibited", False),
        (WELL[:-1] + "3", "3 ", False),
        (WELL.replace("Disabled", "Enabled"), "MIG", None),
        (WELL.replace(" 4,", " 70000,"), "70,000 of 81,559 MiB", None),
    ],
)
def test_doctor_gpu_modes_errors_and_use(line: str, fact: str, ok: bool | None) -> None:
    ((value, passed),) = scores(line).items()
    assert fact in value
    assert passed is ok


def test_doctor_accepts_an_exclusive_gpu_for_one_process() -> None:
    assert scores(WELL.replace("Default", "Exclusive_Process")) == {}


def test_doctor_gpus_of_ray_that_torch_does_not_see() -> None:
    assert scores(WELL, num_ray=1.0) == scores("", num_visible=0, num_ray=0.0) == {}
    ((value, ok),) = scores("", num_visible=7, num_ray=8.0).items()
    assert re.search("8.*7", value)
    assert ok is False


def test_doctor_tries_the_device_of_each_local_rank() -> None:
    tried = []

    def attempt(number: int) -> None:
        tried.append(number)
        torch.ones(2, device="cpu").sum()
        if number == 2:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …")

    failed = environment.tried_devices(4, attempt)
    assert tried == [0, 1, 2, 3]
    assert failed == {2: "CUDA error: out of memory"}
    (found,) = environment.assess_gpus([], 4, failed)
    assert (found.name, found.ok) == ("GPU 2", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_missing_device_fails() -> None:
    assert list(environment.tried_devices(1)) == [0]


@pytest.mark.gpu
def test_doctor_uses_every_gpu_of_this_machine() -> None:
    assert environment.tried_devices(torch.cuda.device_count()) == {}


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        (local.assess_disk("disk", "/data", 3 * GB, True, 20_000), True),
        (local.assess_disk("disk", "/data", 3 * GB, True, 10), False),
        (local.assess_shared_memory(GB, "Permission denied"), False),
        (local.assess_shared_memory(GB, ""), True),
    ],
)
def test_doctor_inodes_and_permissions(found: Any, ok: bool) -> None:
    assert found.ok is ok
    assert bool(found.hint) is not ok
