"""The image: its Dockerfile is valid, and its build context has exactly what it copies."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest
from docker.utils import exclude_paths
from kubernetes_rules import locked

import gatdist

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "deploy/container/Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """Return each instruction and its arguments, continued lines joined."""
    lines = re.sub(r"\\\n(\s*#.*\n)*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def errors_in(text: str) -> list[str]:
    """Return errors of a Dockerfile: line or instruction, and rule."""
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--format", "json", "-"],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [f"line {it['line']}: {it['code']}: {it['message']}" for it in json.loads(done.stdout)]
    given = instructions(text)
    last = {name: value for name, value in given if name not in ("RUN", "COPY", "ARG", "ENV")}
    if not re.fullmatch(r"[1-9]\d*:\d+", last.get("USER", "")):
        found.append("USER: must be a number that is not root's")
    if "HEALTHCHECK" not in last:
        found.append("HEALTHCHECK: is missing")
    if f"ARG BASE=rayproject/ray:{locked('ray')}-py311" not in text:
        found.append(f"ARG BASE: must be Ray {locked('ray')}, as requirements.lock says")
    if f"ARG VERSION={gatdist.__version__}" not in text:
        found.append(f"ARG VERSION: must be {gatdist.__version__}")
    if "torch==" + locked("torch") not in text:
        found.append("comment: names another torch than requirements.lock")
    for name, value in given:
        if name == "RUN" and "pip install" in value and "--no-cache-dir" not in value:
            found.append(f"RUN {value[:40]}: keeps pip's cache")
        if re.search(r"https?://(?!IMAGE)", value):
            found.append(f"{name} {value[:40]}: names a host")
    return found


def test_dockerfile_is_valid() -> None:
    assert errors_in(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("USER 1000:100", "USER root", "DL3002"),
        ("USER 1000:100", "USER 0:0", "USER: must be"),
        ("USER 1000:100", "USRE 1000:100", "unexpected"),
        ("WORKDIR /home/ray", "WORKDIR home/ray", "DL3000"),
        ("ARG BASE=rayproject/ray:2.60.0-py311", "ARG BASE=rayproject/ray:latest", "Ray 2.60.0"),
        ("ARG BASE=rayproject/ray:2.60.0-py311", "ARG BASE=rayproject/ray:2.59.0-py311", "2.60.0"),
        ("ARG VERSION=0.1.0", "ARG VERSION=0.0.9", "ARG VERSION"),
        ("--no-cache-dir ", "", "DL3042"),
        ('CMD ["gatdist", "--help"]', "CMD gatdist --help", "DL3025"),
        ("HEALTHCHECK ", "LABEL ", "HEALTHCHECK: is missing"),
    ],
)
def test_mistake_is_found(old: str, new: str, named: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    found = errors_in(text.replace(old, new)) if named != "unexpected" else broken(text, old, new)
    assert [line for line in found if named in line], found


def broken(text: str, old: str, new: str) -> list[str]:
    """Return hadolint's message about a file that it can't parse."""
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "-"],
        input=text.replace(old, new),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stderr.splitlines() + done.stdout.splitlines()


@pytest.fixture(scope="module")
def context() -> set[str]:
    """Return files that `docker build .` sends, according to .dockerignore."""
    patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = [line for line in patterns if line and not line.startswith("#")]
    found = exclude_paths(str(REPOSITORY), kept, dockerfile=str(DOCKERFILE))
    return {path for path in found if (REPOSITORY / path).is_file()}


def test_build_context_has_all_that_is_copied(context: set[str]) -> None:
    sources = []
    for name, value in instructions(DOCKERFILE.read_text()):
        if name == "COPY":
            words = [word for word in shlex.split(value) if not word.startswith("--")]
            sources += words[:-1]
    assert {"requirements.lock", "pyproject.toml", "gatdist"} <= set(sources)
    for source in sources:
        assert [p for p in context if p == source or p.startswith(f"{source}/")], source
    code = {str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("gatdist/**/*.py")}
    assert code <= context
    assert "gatdist/config/presets/digits.toml" in context


def test_build_context_has_nothing_else(context: set[str]) -> None:
    """Neither tests nor history, environments, runs, or a user's files."""
    tops = {PurePosixPath(path).parts[0] for path in context}
    assert tops <= {
        "LICENSE",
        "README.md",
        "gatdist",
        "pyproject.toml",
        "requirements.lock",
        "deploy",
        ".dockerignore",
    }
    assert not [path for path in context if fnmatch(path, "*.pyc") or "/tests/" in path]


def test_lock_covers_every_extra_of_the_image() -> None:
    """Otherwise pip would choose an untested version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"whl\[([a-z0-9,]+)\]", DOCKERFILE.read_text())
    needs = [*project["dependencies"]]
    for extra in extras.split(","):
        needs += project["optional-dependencies"][extra]
    for need in needs:
        locked(re.match(r"[A-Za-z0-9_-]+", need)[0])
