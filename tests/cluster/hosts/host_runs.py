"""Runs on several hosts, in which something goes wrong on purpose."""

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

# Of a program in a terminal of its own, which heeds hang-ups though these tests may run by nohup.
TERMINAL = ("env", "--default-signal=HUP", "setsid", "--ctty", "--wait")


class Runs:
    """One run directory on the hosts' common file system, and the commands that train in it.

    Args:
        hosts: where.
        folder: of the user: holds plugins and the run directory ``run``.

    Attributes:
        preset: what is trained, or a file.
        settings: of all commands.
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
        # pytest shows it if the test failed
        sys.stderr.write(f"{self.errors if self._reported.exists() else ''}\n{self._ray_log()}")

    @property
    def errors(self) -> str:
        """What the command has written on standard error so far."""
        return self._reported.read_text()

    def faults(self, source: str) -> None:
        """The plugin that every worker imports; see ``HEAD`` for what it may use."""
        (self.folder / "faults_of_this_test.py").write_text(HEAD + textwrap.dedent(source))

    def start(self, *settings: str, workers: str = "2", terminal: int | None = None) -> None:
        """Start ``gatdist train`` on the head.

        A ``terminal`` is a descriptor that becomes its controlling terminal; then there are no
        ``output`` and ``errors``.
        """
        plugins = ['plugins=["faults_of_this_test"]'] * (
            self.folder / "faults_of_this_test.py"
        ).exists()
        sets = [word for s in (*self.settings, *plugins, *settings) for word in ("--set", s)]
        own = self.folder / "tmp"  # what the driver leaves to itself, Ray Train's records for one
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
        """Wait for the command's end. Returns its status; ``output`` is set."""
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
        """The end of what Ray has said, and the driver where a terminal shows it no more."""
        log = self.run_dir / "logs/ray.log"
        return log.read_text(errors="replace")[-5000:] if log.exists() else ""

    def digest(self) -> str:
        """Of all that the run has learned."""
        return digest(str(self.run_dir))

    def committed(self) -> list[int]:
        """Clocks of the checkpoints that are there."""
        found = self.run_dir.glob("checkpoints/*/MANIFEST.json")
        return sorted(int(path.parent.name.partition(".")[0]) for path in found)

    def attempts(self) -> list[dict[str, Any]]:
        """The lines of ``attempts.jsonl``."""
        with suppress(FileNotFoundError):
            text = (self.run_dir / "attempts.jsonl").read_text()
            return [json.loads(line) for line in text.splitlines()]
        return []

    def seen(self) -> list[int]:
        """The clocks of ``metrics.jsonl``."""
        text = (self.run_dir / "metrics.jsonl").read_text()
        return [json.loads(line)["samples_seen"] for line in text.splitlines()]

    def wait_for(self, what: str, timeout_s: float = 300) -> float:
        """Wait for a file that a fault's ``note`` writes. Returns the time it tells."""
        file = self.folder / what
        text = wait_until(
            lambda: file.exists() and file.read_text(), f"{what}", timeout_s=timeout_s
        )
        return float(text.split()[1])

    def wait_until_told(self, pattern: str, timeout_s: float = 300) -> str:
        """Wait until standard error holds what a regular expression matches. Returns that."""
        found = wait_until(
            lambda: re.search(pattern, self.errors), f"{pattern!r}", timeout_s=timeout_s
        )
        return found.group()

    def host_of(self, what: str) -> Host:
        """The host of the worker that wrote a ``note``."""
        name = (self.folder / what).read_text().split()[2]
        return next(host for host in self.hosts.workers if host.name == name)

    def whole(self) -> None:
        """The run ended well, and every tick was written once."""
        assert json.loads(self.output)["status"] == "finished", self.errors
        seen = self.seen()
        assert seen == sorted(set(seen))
        assert set(range(TICK, TOTAL + 1, TICK)) <= set(seen)  # a stop in between adds one
        assert "Traceback" not in self.errors


def need_hosts() -> None:
    """Skip where no hosts can be made; in CI, fail."""
    if reason := why_not():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def now() -> float:
    """Seconds, as ``note`` writes them."""
    return time.time()
