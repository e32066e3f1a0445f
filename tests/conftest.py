"""Guards: a test leaves no thread, environment variable, process group or file behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from faulty_runs import SETTINGS
from support import HANG_S, end_group, start_gatdist

# Before torch is imported, here and in every process that a test starts: two cores, many processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes that tests start would compile the package again, each for half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Who started the tests in the background, or with nohup, has turned these off for all that follows.
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)

# pytest's time limit is enough; one example may be slow on a busy machine.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

REPOSITORY = Path(__file__).resolve().parent.parent

# Threads that a library keeps for the life of the process, by the beginning of their names.
LASTING_THREADS = ("fsspecIO", "asyncio_", "pytest_timeout", "ray_", "PythonGCThread")
# Variables that pytest, or a library when it is imported, sets for the process.
LASTING_VARIABLES = (
    "PYTEST_",
    "KINETO_",
    "KMP_",
    "TORCH",
    "TRITON",
    "RAY_",
    "GRPC_",
    "PYTHONBREAKPOINT",
)
# Where tools keep their caches. Sources are ignored too: a person may be editing them meanwhile.
IGNORED_FOLDERS = {"__pycache__", "artifacts", "build"}
SOURCES = {".py", ".md", ".toml"}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Embedded data sets and the like are made once a session, and not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATDIST_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from shared generators depends neither on its order nor on other tests."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (networks of users draw from it)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_leaked_thread() -> Iterator[None]:
    """A test ends the threads it started; those that are just ending get two seconds."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 2
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(LASTING_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"the test left a thread running: {thread}"


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """A test puts environment variables back (``monkeypatch.setenv`` does)."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {
        name: after.get(name)
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.startswith(LASTING_VARIABLES)
    }
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert not changed, f"the test left environment variables changed: {changed}"


@pytest.fixture(autouse=True)
def no_leaked_process_group() -> Iterator[None]:
    """A test destroys the torch process group it made."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a torch process group initialized")


@pytest.fixture(autouse=True)
def no_files_in_repository() -> Iterator[None]:
    """A test writes to ``tmp_path``, or to ``tests/artifacts`` what people look at afterwards."""
    before = _files()
    yield
    left = sorted(_files() - before)
    assert not left, f"the test left files in the repository: {left}"


def _files() -> set[str]:
    found = set()
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in IGNORED_FOLDERS]
        found |= {os.path.join(folder, n) for n in names if os.path.splitext(n)[1] not in SOURCES}
    return found


@pytest.fixture(scope="session")
def run_gatdist(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_gatdist(*args, timeout=300, env={}, cwd=None)``: a gatdist command, run to its end.

    ``env`` is added to the environment (None removes a variable). Past ``timeout`` seconds the
    command's process group is killed and the test fails with what it had written.
    """

    def run(
        *args: object,
        timeout: float = HANG_S,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        process = start_gatdist(*args, cwd=cwd or tmp_path_factory.mktemp("cwd"), env=env)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_group(process)
            output, errors = process.communicate()
            pytest.fail(f"{process.args} took more than {timeout:g} s\n{output}\n{errors}")
        finally:
            end_group(process)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


@pytest.fixture(scope="session")
def alone(
    tmp_path_factory: pytest.TempPathFactory, run_gatdist: Callable[..., Any]
) -> Callable[..., str]:
    """The digests of ``faulty_runs`` of one worker, without Ray and left alone, by settings."""
    found: dict[tuple[str, ...], str] = {}

    def digest_of(*settings: str) -> str:
        if settings not in found:
            folder = tmp_path_factory.mktemp("alone")
            sets = [word for s in (*SETTINGS, *settings) for word in ("--set", s)]
            trained = run_gatdist(
                "train", "digits", "--local", "--run-dir", "run", *sets, cwd=folder, timeout=300
            )
            assert trained.returncode == 0, trained.stderr
            found[settings] = run_gatdist("inspect", "run", "--digest", cwd=folder).stdout.strip()
        return found[settings]

    return digest_of
