"""Runs on several hosts with fault injection."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from benchmarks.hosts import Host, Hosts, why_not
from faulty_runs import HEAD, SETTINGS, TICK, TOTAL
from gatdist.runs.inspection import digest
from support import end_group, wait_until

# Runs a program in its own terminal, with SIGHUP enabled even if the tests run under nohup.
TERMINAL = ("env", "--default-signal=HUP", "setsid", "--ctty", "--wait")


class Runs:
    """A run directory on the hosts' common file system, and the commands that train in it.

    Args:
        hosts: The hosts.
        folder: The user's folder, with plugins and the run directory ``run``.

    Attributes:
        preset: Name or file of the preset.
        settings: Settings of all commands.
    """

    preset = "digits"
    settings: Sequence[str] = SETTINGS

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.run_dir = hosts, folder, folder / "run"
        self.output = ""
        self._reported = folder / "stderr"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process and self._process.returncode is None:
            end_group(self._process)
            self._process.communicate()
        # pytest shows it if the test fails
        sys.stderr.write(f"{self.errors if self._reported.exists() else ''}\n{self._ray_log()}")

    @property
    def errors(self) -> str:
        """Return the command's standard error so far."""
        return self._reported.read_text()

    def faults(self, source: str) -> None:
        """Write the plugin that every worker imports; ``HEAD`` is prepended."""
        (self.folder / "faults_of_this_test.py").write_text(HEAD + textwrap.dedent(source))

    def start(self, *settings: str, workers: str = "2", terminal: int | None = None) -> None:
        """Start ``gatdist train`` on the head.

        ``terminal`` is a descriptor that becomes its controlling terminal; then ``output`` and
        ``errors`` are empty.
        """
        plugins = ['plugins=["faults_of_this_test"]'] * (
            self.folder / "faults_of_this_test.py"
        ).exists()
        sets = [word for s in (*self.settings, *plugins, *settings) for word in ("--set", s)]
        own = self.folder / "tmp"  # for temporary files of the driver, such as records of Ray Train
        own.mkdir(exist_ok=True)
        with self._reported.open("w") as errors:
            streams = {"stdout": subprocess.PIPE, "stderr": errors}
            if terminal is not None:
                streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
            self._process = self.hosts.head.start(
                *(TERMINAL if terminal is not None else ()),
                sys.executable, "-m", "gatdist", "train", self.preset, "--workers", workers,
                "--address", self.hosts.head.ray_address, "--run-dir", "run", "--json", *sets,
                cwd=self.folder, env={"TMPDIR": str(own)}, **streams,
            )  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[str]:
        """The running command."""
        assert self._process is not None
        return self._process

    def finish(self, timeout_s: float = 300) -> int:
        """Wait until the command exits, and return its status; sets ``output``."""
        try:
            self.output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            end_group(self.process)
            self.output, _ = self.process.communicate()
            raise AssertionError(f"{error}\n{self.errors}\n{self._ray_log()}") from None
        finally:
            end_group(self.process)
        return self.process.returncode

    def _ray_log(self) -> str:
        """Return the end of Ray's log, which also has the driver's output without a terminal."""
        log = self.run_dir / "logs/ray.log"
        return log.read_text(errors="replace")[-5000:] if log.exists() else ""

    def digest(self) -> str:
        """Return the digest of the newest checkpoint."""
        return digest(str(self.run_dir))

    def committed(self) -> list[int]:
        """Return ``samples_seen`` of the committed checkpoints."""
        found = self.run_dir.glob("checkpoints/*/MANIFEST.json")
        return sorted(int(path.parent.name.partition(".")[0]) for path in found)

    def attempts(self) -> list[dict[str, Any]]:
        """Return the lines of ``attempts.jsonl``."""
        return self._lines("attempts.jsonl")

    def changes(self) -> list[dict[str, Any]]:
        """Return the lines of ``worker_changes.jsonl``."""
        return self._lines("worker_changes.jsonl")

    def _lines(self, file: str) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            text = (self.run_dir / file).read_text()
            return [json.loads(line) for line in text.splitlines()]
        return []

    def logged(self) -> list[int]:
        """Return ``samples_seen`` of each line of ``metrics.jsonl``."""
        text = (self.run_dir / "metrics.jsonl").read_text()
        return [json.loads(line)["samples_seen"] for line in text.splitlines()]

    def wait_for(self, what: str, timeout_s: float = 300) -> float:
        """Wait for a file that a fault's ``note`` writes, and return the time in it."""
        file = self.folder / what
        text = wait_until(
            lambda: file.exists() and file.read_text(), f"{what}", timeout_s=timeout_s
        )
        return float(text.split()[1])

    def wait_for_message(self, pattern: str, timeout_s: float = 300) -> str:
        """Wait until standard error matches a regular expression, and return the match."""
        found = wait_until(
            lambda: re.search(pattern, self.errors), f"{pattern!r}", timeout_s=timeout_s
        )
        return found.group()

    def host_of(self, what: str) -> Host:
        """Return the host of the worker that wrote a ``note``."""
        name = (self.folder / what).read_text().split()[2]
        return next(host for host in self.hosts.workers if host.name == name)

    def require_complete(self) -> None:
        """Assert that the run finished and that every log interval was written once."""
        assert json.loads(self.output)["status"] == "finished", self.errors
        logged = self.logged()
        assert logged == sorted(set(logged))
        assert set(range(TICK, TOTAL + 1, TICK)) <= set(logged)  # a stop in between adds one
        assert "Traceback" not in self.errors


def need_hosts() -> None:
    """Skip if no hosts can be created; in CI, fail."""
    if reason := why_not():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def now() -> float:
    """Return seconds, as ``note`` writes them."""
    return time.time()
