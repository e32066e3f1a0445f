"""Documents name existing files, folders, modules, headings and tests; arrows match imports."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from documents import REPOSITORY, blocks

PACKAGE = REPOSITORY / "gatdist"
PAGES = [
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
]
_LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_TEST = re.compile(r"\[(?:(test_\w+)|[^]]*)\]\((\S*tests/\S+\.py)(?: \"(\w+)\")?\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_NAME = re.compile(r"`(gatdist(?:\.\w+)+)`")
_PATH = re.compile(r"`((?:gatdist|tests|benchmarks|docs|deploy)/[\w./-]*)`")


def anchors(page: Path) -> set[str]:
    """Return anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = _CODE.sub("", (REPOSITORY / page).read_text())
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if not p.endswith(("LOG.md", "CHANGELOG.md"))])
def test_paths_exist(page: str) -> None:
    for path in _PATH.findall(_CODE.sub("", (REPOSITORY / page).read_text())):
        assert (REPOSITORY / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", [p for p in PAGES if not p.endswith(("LOG.md", "CHANGELOG.md"))])
def test_names_can_be_imported(page: str) -> None:
    for name in _NAME.findall(_CODE.sub("", (REPOSITORY / page).read_text())):
        pkgutil.resolve_name(name)


def parts() -> set[str]:
    """Return top-level modules and packages of gatdist."""
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}


def imported(part: str) -> set[str]:
    """Return the parts that a part imports."""
    path = PACKAGE / part
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                found |= {name.split(".")[1] for name in names if name.startswith("gatdist.")}
    return found


def test_architecture_diagram_matches_imports() -> None:
    chart = next(
        b.text for b in blocks("docs/explanation/architecture.md") if b.language == "mermaid"
    )
    labels = dict(re.findall(r'(\w+)\["([\w, ]+)<br/>', chart))
    assert labels
    for node, label in labels.items():
        for name in label.split(", "):
            assert name in parts(), name
        assert node in label.split(", "), node
    arrows = re.findall(r'^ *(\w+)(?:\[".*?"\])? --> (\w+)', chart, re.MULTILINE)
    assert len(arrows) == chart.count("-->")
    for start, end in arrows:
        users = labels[start].split(", ")
        used = set(labels[end].split(", "))
        assert any(used & imported(user) for user in users), f"{start} does not import {end}"


def test_architecture_names_every_part() -> None:
    text = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text()
    unnamed = parts() - {"__init__", "__main__", "__pycache__", "py"}
    for part in unnamed - {"background"}:
        assert re.search(rf"\b{part}\b", text), part


def test_index_links_every_guide() -> None:
    docs = REPOSITORY / "docs"
    links = _LINK.findall((docs / "README.md").read_text())
    for guide in sorted(docs.rglob("*.md")):
        name = str(guide.relative_to(docs))
        assert name in links or name == "README.md", name


@pytest.mark.parametrize("page", ["README.md", "docs/explanation/guarantees.md"])
def test_guarantees_name_existing_tests(page: str) -> None:
    found = _TEST.findall((REPOSITORY / page).read_text())
    assert len(found) > 5
    for text, path, title in found:
        source = ((REPOSITORY / page).parent / path).read_text()
        assert f"def {text or title}(" in source, f"{page}: {text or title} in {path}"


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 110
