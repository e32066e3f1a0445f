"""The lock names each package exactly once, and matches what is installed."""

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


def test_no_package_occurs_twice() -> None:
    names = [plain(line.partition("==")[0]) for line in LINES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("line", LINES)
def test_installed_versions_are_pinned_versions(line: str) -> None:
    name, _, version = line.partition("==")
    # torch's builds append their device after a plus sign.
    assert Version(Version(metadata.version(name)).public) == Version(version)


def test_all_dependencies_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requested = {plain(Requirement(text).name) for text in project["dependencies"]}
    for extra in extras.keys() - {"bench"}:  # peers of the benchmarks are not pinned
        requested |= {plain(Requirement(text).name) for text in extras[extra]}
    # torch's builds for CUDA pin triton to their own version; `make setup` adds it to others.
    unpinned = {"gatdist", "triton"}
    assert requested - {plain(line.partition("==")[0]) for line in LINES} == unpinned
