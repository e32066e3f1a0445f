"""Shared fixtures of the unit tests."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatdist.storage import Store


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[[str], str]:
    """Write a scenario's text into a file, and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "scenario.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(params=["local", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A run directory on this machine's disk, and one in memory."""
    if request.param == "local":
        yield Store(str(tmp_path / "run"))
        return
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    yield store
    store.delete("")
