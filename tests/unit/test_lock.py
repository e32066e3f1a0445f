"""The lock names each package once, exactly, and it is what is installed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_line_pins_one_version() -> None:
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_none_is_there_twice() -> None:
    names = [plain(line.partition("==")[0]) for line in LINES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("line", LINES)
def test_what_is_installed_is_what_is_pinned(line: str) -> None:
    name, _, version = line.partition("==")
    # torch's builds say for which device they are, behind a plus.
    assert Version(Version(metadata.version(name)).public) == Version(version)


def test_all_that_the_project_needs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requested = {plain(Requirement(text).name) for text in project["dependencies"]}
    for extra in extras.keys() - {"bench"}:  # the peers to measure against are not pinned
        requested |= {plain(Requirement(text).name) for text in extras[extra]}
    assert requested - {plain(line.partition("==")[0]) for line in LINES} == {"gatdist"}
