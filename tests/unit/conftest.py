"""What several files of this folder need."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[[str], str]:
    """Writes a scenario's text into a file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "scenario.toml"
        path.write_text(text)
        return str(path)

    return write
