"""Guards against leaked threads, environment variables, process groups and files."""

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

# Set before torch is imported, here and in all child processes: two cores, many processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Otherwise each child process would compile the package again, which takes half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell that starts the tests in the background or with nohup ignores these signals.
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)

# pytest's time limit suffices; a single example may be slow on a busy machine.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

REPOSITORY = Path(__file__).resolve().parent.parent

# Prefixes of the names of threads that a library keeps until the process exits.
LASTING_THREADS = ("fsspecIO", "asyncio_", "pytest_timeout", "ray_", "PythonGCThread")
# Variables that pytest, or a library on import, sets for the process.
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
# Caches of tools. Sources are excluded, too, since they may be edited during the tests.
IGNORED_FOLDERS = {"__pycache__", "artifacts", "build"}
SOURCES = {".py", ".md", ".toml"}


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use one temporary cache folder per session, so that embedded data sets are written once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATDIST_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global random generators, so that tests do not depend on their order."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (user networks may draw from it)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_leaked_thread() -> Iterator[None]:
    """Fail if a test leaves threads running; threads that are ending get two seconds."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 2
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(LASTING_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"the test left a thread running: {thread}"


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Fail if a test leaves environment variables changed (use ``monkeypatch.setenv``)."""
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
    """Fail if a test does not destroy the torch process group that it created."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a torch process group initialized")


@pytest.fixture(autouse=True)
def forgotten_user_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove what a test registered, and the modules that it imported from temporary folders."""
    temporary = tmp_path_factory.getbasetemp().resolve()
    names = {id(registry): set(registry.names()) for registry in _registries()}
    modules = set(sys.modules)
    yield
    for registry in _registries():
        for name in set(registry.names()) - names.get(id(registry), set()):
            entry = getattr(registry[name], "func", registry[name])  # of a partial
            module = getattr(entry, "__module__", "")
            if module in modules or not module.startswith("gatdist."):  # else newly imported
                del registry._entries[name]
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if temporary in Path(file).parents:
            del sys.modules[name]


def _registries() -> list[Any]:
    module = sys.modules.get("gatdist.common.registry")
    if module is None:
        return []
    loaded = [vars(sys.modules[name]) for name in sys.modules if name.startswith("gatdist.")]
    found = [x for names in loaded for x in names.values() if isinstance(x, module.Registry)]
    return list({id(x): x for x in found}.values())


@pytest.fixture(autouse=True)
def no_files_in_repository() -> Iterator[None]:
    """Fail if a test writes to the repository, except to ``tests/artifacts``."""
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
    """``run_gatdist(*args, timeout=300, env={}, cwd=None)``: run a gatdist command until it exits.

    ``env`` is added to the environment (None removes a variable). After ``timeout`` seconds the
    command's process group is killed, and the test fails and shows the output.
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
def reference_digest(
    tmp_path_factory: pytest.TempPathFactory, run_gatdist: Callable[..., Any]
) -> Callable[..., str]:
    """Return the digest of a fault-free ``faulty_runs`` run: one worker, no Ray; by settings."""
    found: dict[tuple[str, ...], str] = {}

    def digest_of(*settings: str) -> str:
        if settings not in found:
            folder = tmp_path_factory.mktemp("reference")
            sets = [word for s in (*SETTINGS, *settings) for word in ("--set", s)]
            trained = run_gatdist(
                "train", "digits", "--local", "--run-dir", "run", *sets, cwd=folder, timeout=300
            )
            assert trained.returncode == 0, trained.stderr
            found[settings] = run_gatdist("inspect", "run", "--digest", cwd=folder).stdout.strip()
        return found[settings]

    return digest_of
