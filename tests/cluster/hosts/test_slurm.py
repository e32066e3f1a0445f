"""``deploy/slurm/train.sbatch``, unchanged, on a real Slurm with two nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_runs import Runs
from slurm_nodes import Slurm

from benchmarks.hosts import Hosts
from faulty_runs import SETTINGS
from support import wait_until

pytestmark = pytest.mark.hosts

SCRIPT = Path(__file__).resolve().parents[3] / "deploy/slurm/train.sbatch"


@pytest.fixture(scope="module")
def slurm(own_hosts: Hosts) -> Iterator[Slurm]:
    """A controller and two nodes."""
    with Slurm(own_hosts) as running:
        yield running


class Job:
    """The script, submitted from the folder ``folder``."""

    def __init__(
        self, slurm: Slurm, folder: Path, *words: str, gpus: int = 1, **environment: str
    ) -> None:
        self.slurm = slurm
        home = folder / "home"
        home.mkdir()
        settings = {"HOME": f"{home}", "GATDIST_VENV": sys.prefix, **environment}
        options = ["--parsable", "--nodes=2", f"--gpus-per-node={gpus}"]
        self.id = slurm.run("sbatch", *options, SCRIPT, *words, cwd=folder, env=settings).strip()
        self._log = folder / f"gatdist-{self.id}.log"

    @property
    def log(self) -> str:
        """Return its output in all attempts."""
        return self._log.read_text() if self._log.exists() else ""

    def wait_for_message(self, text: str, timeout_s: float = 300) -> None:
        """Wait until its log contains a text."""
        try:
            wait_until(lambda: text in self.log, repr(text), timeout_s=timeout_s)
        except pytest.fail.Exception:
            sys.stderr.write(self.log + self.slurm.logs())
            raise

    def end(self, timeout_s: float = 300) -> dict[str, str]:
        """Wait until it ends, and return Slurm's description of it."""
        alive = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
        try:
            return wait_until(
                lambda: (s := self.slurm.state(self.id))["JobState"] not in alive and s,
                f"job {self.id}", timeout_s=timeout_s,
            )  # fmt: skip
        finally:
            sys.stderr.write(self.log)  # pytest shows it if the test fails


def test_job_at_its_time_limit_is_requeued_and_resumes(
    hosts: Hosts, slurm: Slurm, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "run.total_samples=3200"]
    sets = [word for setting in settings for word in ("--set", setting)]
    job = Job(slurm, tmp_path, "digits", "--run-dir", "run", *sets)
    job.wait_for_message("checkpoint at 1,280")
    # What --signal in the script makes Slurm send five minutes before the limit.
    slurm.run("scancel", "--batch", "--signal=TERM", job.id)
    job.wait_for_message("ended with status 75")
    state = job.end()

    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1")
    runs = Runs(hosts, tmp_path)
    first, second = runs.attempts()
    assert first["world_size"] == second["world_size"] == 2
    assert sorted(first["hosts"]) == ["w1", "w2"]
    assert 1280 <= second["resumed_from"] < 3200
    assert runs.committed()[-1] == 3200
    seen = runs.logged()
    assert seen == sorted(set(seen))
    token = tmp_path / "home/.ray/auth_token"
    assert token.stat().st_mode & 0o077 == 0
    assert token.read_text() not in job.log
    assert not Path(f"/tmp/gatdist-{job.id}").exists()  # the nodes share this machine's disk


def test_cancelled_job_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "digits", "--run-dir", "run", gpus=0)
    job.wait_for_message("attempt 1 on w[1-2], workers: 2")
    slurm.run("scancel", job.id)
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")


def test_what_the_user_must_fix_is_reported_before_anything_starts(
    slurm: Slurm, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "digits", GATDIST_VENV="/nowhere")
    state = job.end()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "GATDIST_VENV = /nowhere: " in job.log
    assert "attempt" not in job.log
