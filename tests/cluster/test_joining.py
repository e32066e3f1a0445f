"""Under Ray, workers join a run where there is room: beyond its first size, and as spares."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from changing_workers import SMALL_FILES
from faulty_runs import HEAD, SHORT
from support import HANG_S, end_group, free_port, ray_head, start_gatdist, wait_until

pytestmark = pytest.mark.cluster

SETTINGS = [*SHORT, "run.virtual_workers=4", 'plugins=["faults"]']
# Each worker leaves its process id, and slows the run down until the test is done with it.
PLUGIN = """
def slowly():
    (folder / f"pid-{here.rank}").write_text(str(os.getpid()))
    if here.step > 10 and not (folder / "hurry").exists(): time.sleep(0.5)
always_at("data", slowly)
"""


class Run:
    """A run in ``folder``, on the Ray at ``address``; a context manager that ends it."""

    def __init__(self, folder: Path, address: str, *words: str) -> None:
        self.folder = folder
        (folder / "faults.py").write_text(HEAD + PLUGIN + SMALL_FILES)
        sets = [w for setting in SETTINGS for w in ("--set", setting)]
        words = ("--json", "--run-dir", "run", "--address", address, *words, *sets)
        self._file = folder / "stderr"
        with self._file.open("w") as errors:
            self.process = start_gatdist("train", "digits", *words, cwd=folder, stderr=errors)

    @property
    def errors(self) -> str:
        return self._file.read_text()

    def wait_for(self, *patterns: str) -> None:
        """Wait until standard error has these messages, in this order."""
        pattern = "(?s)" + ".*".join(patterns)
        wait_until(lambda: re.search(pattern, self.errors), pattern)

    def kill(self, rank: int) -> None:
        os.kill(int((self.folder / f"pid-{rank}").read_text()), signal.SIGKILL)

    def finish(self) -> None:
        (self.folder / "hurry").touch()
        self.process.communicate(timeout=HANG_S)
        assert self.process.returncode == 0, self.errors

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        end_group(self.process)
        self.process.communicate()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of a Ray with room for one worker, to which the tests add nodes."""
    options = ("--num-cpus=1", "--object-store-memory=100000000")
    env = {"RAY_AUTH_MODE": "disabled"}
    with ray_head(tmp_path_factory.mktemp("ray"), *options, env=env, port=free_port()) as found:
        yield found


def changes(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run/worker_changes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def add_node(address: str, cpus: int, folder: Path) -> None:
    """Start one more node, which ends with the head."""
    mark = f"gatdist-ray-{address.rpartition(':')[2]}"
    command = [Path(sys.executable).parent / "ray", "start", f"--address={address}"]
    options = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}"]
    with (folder / "start.log").open("wb") as output:
        subprocess.run(
            [*command, *options, "--object-store-memory=100000000"],
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "MARK": mark},
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_gatdist) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "faults.py").write_text(HEAD)
    sets = [w for setting in SETTINGS for w in ("--set", setting)]
    run_gatdist("train", "digits", "--local", "--run-dir", "run", *sets, cwd=folder)
    return run_gatdist("inspect", folder / "run", "--digest").stdout.strip()


def test_a_run_grows_and_loses_two_workers_at_once(address, undisturbed, tmp_path, run_gatdist):
    """1 → 4 → 2 → 4 workers of 4."""
    with Run(tmp_path, address, "--workers", "1:4") as run:
        run.wait_for("160/1,920")
        (tmp_path / "node").mkdir()
        add_node(address, 3, tmp_path / "node")
        run.wait_for("continuing with 4 workers")
        files = [tmp_path / f"pid-{rank}" for rank in range(4)]
        wait_until(lambda: all(file.exists() for file in files), "a step of four workers")
        run.kill(1)
        run.kill(3)
        run.wait_for("continuing with 4 workers", "continuing with 2 workers", "with 4 workers")
        run.finish()
    assert run_gatdist("inspect", tmp_path / "run", "--digest").stdout.strip() == undisturbed
    assert [change["workers"] for change in changes(tmp_path)][-1] == 4
    assert list(tmp_path.glob("run/checkpoints/*/*-of-*.safetensors"))


def test_a_spare_takes_the_place_of_a_lost_worker(address, undisturbed, tmp_path, run_gatdist):
    """On the nodes of the test before."""
    with Run(tmp_path, address, "--workers", "3", "--set", "cluster.spares=1") as run:
        run.wait_for("1 spare worker ready")
        began = time.monotonic()
        run.kill(1)
        run.wait_for("continuing with 3 workers")
        sys.stderr.write(f"it took the place after {time.monotonic() - began:.1f} s\n")
        run.finish()
    assert run_gatdist("inspect", tmp_path / "run", "--digest").stdout.strip() == undisturbed
    (change,) = changes(tmp_path)
    assert (change["before"], change["workers"], change["steps_undone"]) == (3, 3, 1)
