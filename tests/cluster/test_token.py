"""A cluster that requires a token, and a driver with a wrong token or none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from support import ray_head

pytestmark = pytest.mark.cluster

RIGHT, WRONG = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def guarded_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a Ray that requires the token ``RIGHT``."""
    options = "--num-cpus=1", "--object-store-memory=80000000"
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RIGHT}
    with ray_head(tmp_path_factory.mktemp("ray"), *options, env=env) as address:
        yield address


@pytest.mark.parametrize(
    "environment",
    [
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None},
    ],
)
@pytest.mark.parametrize(
    "command", [["doctor"], pytest.param(["train", "digits"], marks=pytest.mark.slow)]
)
def test_wrong_token_is_rejected_at_once(
    guarded_address, run_gatdist, tmp_path, command, environment
):
    began = time.monotonic()
    done = run_gatdist(
        *command, "--address", guarded_address, cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "cluster.address" in done.stderr
    assert "RAY_AUTH_TOKEN or ~/.ray/auth_token" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20  # how long Ray would retry


def test_notice_without_token_is_rejected(guarded_address, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG, "RAY_ADDRESS": guarded_address}
    done = subprocess.run(
        [sys.executable, "-m", "gatdist.cluster.drain", "--within", "20"],
        capture_output=True,
        text=True,
        env=os.environ | token,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


def test_address_auto_does_not_bypass_the_token(guarded_address, run_gatdist):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG, "RAY_ADDRESS": guarded_address}
    done = run_gatdist("doctor", "--address", "auto", env=token)
    assert done.returncode == 2
    assert f"cluster.address = '{guarded_address}': " in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_right_token_is_accepted(guarded_address, run_gatdist):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RIGHT}
    done = run_gatdist("doctor", "--address", guarded_address, env=token, timeout=300)
    assert done.returncode != 2, done.stderr
    assert "RAY_AUTH_TOKEN" not in done.stdout + done.stderr
