"""One Ray for all tests of this folder: starting it takes longer than most of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support import free_port, marked_processes


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a Ray with 2 CPUs, ended by its processes' ids."""
    port = free_port()
    mark = f"gatdist-ray-{port}"
    log = tmp_path_factory.mktemp("ray") / "start.log"
    options = {
        "--port": port,
        "--num-cpus": 2,
        "--include-dashboard": "false",
        "--object-store-memory": 100_000_000,
        "--node-ip-address": "127.0.0.1",
    }
    try:
        with log.open("wb") as output:
            subprocess.run(
                [Path(sys.executable).parent / "ray", "start", "--head"]
                + [f"{name}={value}" for name, value in options.items()],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ
                | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "MARK": mark},
                check=True,
                timeout=90,
            )
        yield f"127.0.0.1:{port}"
    finally:
        # By id: `ray stop` would end every Ray on this machine.
        for process in marked_processes(mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
