"""Generated tables are up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import CASES, LONG, NEEDS, attempted
from benchmarks.case import RESULTS
from benchmarks.readme import ALL_RESULTS, BEGIN, HIGHLIGHTS, QUALITY, README, SPEED, with_results
from benchmarks.records import REPORTERS, Record, newest


@pytest.mark.parametrize("page", [README, ALL_RESULTS])
def test_tables_show_newest_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_results(page, text, newest()), "stale: python -m benchmarks.readme"


@pytest.mark.parametrize("page", [README, ALL_RESULTS])
def test_new_record_makes_table_stale(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    records = newest()
    digits = next(record for record in records if record.name == "digits")
    better = json.loads(json.dumps(digits.found))
    better["metrics"]["metric/fid"] = 0.123
    changed = [Record(r.folder, better) if r is digits else r for r in records]
    assert "FID 0.123" in with_results(page, text, changed)
    assert "FID 0.123" not in text


def test_page_without_markers_is_rejected() -> None:
    with pytest.raises(SystemExit, match="has no lines"):
        with_results(README, README.read_text(encoding="utf-8").replace(BEGIN, ""), newest())


def test_every_record_names_its_environment() -> None:
    for record in newest():
        facts = record.found.get("environment") or record.found["hosts"][0]
        assert facts.get("commit") or facts["recorded_in"], record.folder
        assert facts["processor"], record.folder
        assert facts["cores"] > 0, record.folder
        assert facts["packages"]["torch"], record.folder


def test_every_row_has_a_record_or_reporter() -> None:
    recorded = {record.name for record in newest()}
    assert {name for name, _ in HIGHLIGHTS} <= recorded
    for name in (*QUALITY, *SPEED):
        assert name in recorded or name in REPORTERS, name
    for record in newest():
        if record.name in (*QUALITY, *SPEED):
            assert record.lines(), record.folder


def test_requirements_and_exclusions_of_make_bench_are_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert LONG | NEEDS.keys() <= CASES.keys()
    monkeypatch.setitem(NEEDS, "step", ("two moons", lambda: True))
    assert attempted("step").endswith("skipped: needs two moons")


def test_every_plot_can_be_drawn(tmp_path: Path) -> None:
    from benchmarks import plots

    pytest.importorskip("matplotlib")
    name = "recovery"
    folder = sorted(RESULTS.glob(f"*_{name}"))[-1]
    found = json.loads((folder / "result.json").read_text())
    assert plots.draw(name, found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert not plots.draw("games", found, tmp_path / "none.png")
