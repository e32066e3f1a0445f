"""One Ray for all tests of this folder: starting it takes longer than most of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import end_group, free_port, wait_until


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a Ray with 2 CPUs, ended by its process group."""
    port = free_port()
    log = tmp_path_factory.mktemp("ray") / "start.log"
    ray = str(Path(sys.executable).parent / "ray")
    options = {
        "--port": port,
        "--num-cpus": 2,
        "--include-dashboard": "false",
        "--object-store-memory": 100_000_000,
        "--node-ip-address": "127.0.0.1",
    }
    arguments = [f"{name}={value}" for name, value in options.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ray, "start", "--head", "--block", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), "Ray to start", timeout_s=90)
        yield f"127.0.0.1:{port}"
    finally:
        # Ray's own processes are children that share the group; raylet ends its workers with it.
        process.terminate()
        try:
            process.wait(20)
        finally:
            end_group(process)
