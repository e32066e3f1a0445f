"""Shared fixtures of the unit tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[[str], str]:
    """Write a scenario's text into a file, and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "scenario.toml"
        path.write_text(text)
        return str(path)

    return write
