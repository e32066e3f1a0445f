"""Documents, code and messages use standard terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import plain_language


def test_no_expression_with_a_standard_term_is_used() -> None:
    assert [line for path in plain_language.files() for line in plain_language.check(path)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The doctor tells of it.", ["tells"]),
        ("a bad step moves nobody, and is BORNE", ["moves nobody", "BORNE"]),
        ("def test_a_verdict_that_moves_nobody(", ["verdict", "moves_nobody"]),
        ("two halves of the real data, intelligible, retold, amended, file.tell()", []),
    ],
)
def test_whole_words_are_found(
    text: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_language, "REPOSITORY", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(f"\n{text}\n")
    lines = list(plain_language.check(path))
    assert len(lines) == len(found)
    for line, expression in zip(lines, found, strict=True):
        assert line.startswith(f"page.md:2: '{expression}': write ")


def test_every_exception_is_needed() -> None:
    for name in plain_language.EXCEPTIONS:
        assert (plain_language.REPOSITORY / name).exists(), name
