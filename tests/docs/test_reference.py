"""The reference documents all of the code, and nothing else."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from docs import docstrings, write_reference
from documents import REPOSITORY
from gatdist.config import Config, NamedConfig
from gatdist.monitor.tags import FIELDS, TAGS, Tag

FAMILIES = {tag.name.partition("/")[0] for tag in TAGS}
# Strings that look like tags: names of random streams, and alarms, which are checked one by one.
OTHERS = {"augmentation/<x>", "health/<x>"}


def test_reference_is_up_to_date() -> None:
    assert write_reference.stale(write_reference.pages()) == [], "python -m docs.write_reference"


def test_changed_or_obsolete_page_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_reference, "FOLDER", tmp_path)
    (tmp_path / "same.md").write_text("a")
    (tmp_path / "changed.md").write_text("a")
    (tmp_path / "left_over.md").write_text("a")
    found = write_reference.stale({"same.md": "a", "changed.md": "b", "new.md": "c"})
    assert found == ["changed.md", "left_over.md", "new.md"]


def test_exactly_the_existing_keys_are_documented() -> None:
    models = {Config}
    waiting = [Config]
    while waiting:
        for field in waiting.pop().model_fields.values():
            new = {*write_reference.models_in(field.annotation)} - models - {NamedConfig}
            models |= new
            waiting += new
    for model in models - {Config}:
        assert docstrings.fields_of(model).keys() == model.model_fields.keys(), model


def written_tags() -> set[str]:
    """Return strings of the code that are tags; a placeholder is ``<x>``."""
    found = set()
    for folder in ("training", "game", "data", "monitor", "cluster", "evaluation", "runs"):
        for path in (REPOSITORY / "gatdist" / folder).rglob("*.py"):
            if path.name in ("tags.py", "charts.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                text = ""
                if isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(v.value) if isinstance(v, ast.Constant) else "<x>" for v in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                family, slash, name = text.partition("/")
                if slash and family in FAMILIES and re.fullmatch(r"[\w<>]+", name):
                    found.add(text)
    return found


def matches(known: Tag, tag: str) -> bool:
    return re.fullmatch(re.sub(r"<\w+>", r"[^/]+", re.escape(known.name)), tag) is not None


def test_every_written_tag_is_documented() -> None:
    missing = {
        tag for tag in written_tags() - OTHERS if not any(matches(known, tag) for known in TAGS)
    }
    assert not missing, f"add to gatdist/monitor/tags.py: {missing}"


def test_every_documented_tag_is_written() -> None:
    written = {re.sub(r"<\w+>", "X", tag) for tag in written_tags()}
    alarms = (REPOSITORY / "gatdist" / "training" / "health.py").read_text()
    for tag in TAGS:
        name = re.sub(r"<\w+>", "X", tag.name)
        phase = tag.name.startswith("time/")
        players = {name.replace("X", player) for player in ("generator", "discriminator", "X")}
        alarm = tag.name.startswith("health/") and tag.name[7:].replace("<player>", "") in alarms
        assert players & written or phase or alarm, tag.name


def test_all_files_of_a_run_are_documented(tmp_path: Path) -> None:
    from gatdist.cli import main
    from newcomer import small

    augmented = ['game.augmentation={name="ada"}', "game.penalties={r1={strength=1.0}}"]
    sets = [word for setting in augmented for word in ("--set", setting)]
    assert main(small(["train", "digits", "--local", "--run-dir", str(tmp_path), *sets])) == 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        for name in json.loads(line):
            assert any(matches(known, name) for known in (*TAGS, *FIELDS)), name
