"""Reports of runs in every state, and how much of a run a page contains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gatdist.cli import main
from gatdist.common.errors import StorageError
from gatdist.monitor.grid import encode_png
from gatdist.runs.report import report
from gatdist.runs.report.curves import nice_ticks, thinned
from gatdist.runs.report.findings import events
from gatdist.runs.report.previews import spread

CONFIG = {"run": {"total_samples": 1000}, "data": {"url": "builtin:digits"}}
ATTEMPT = {"attempt": 1, "time": "2026-01-01T00:00:00Z", "world_size": 2, "hosts": ["a", "b"]}


def written(folder: Path, ticks: int = 3, **more: object) -> Path:
    """A run directory without checkpoints or samples."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "attempts.jsonl").write_text(json.dumps(ATTEMPT) + "\n")
    lines = (
        json.dumps({"samples_seen": 64 * i, "loss/generator": 1 / i} | more) + "\n"
        for i in range(1, ticks + 1)
    )
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_run_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"samples_seen": 256, "loss/gen')  # as a reader may find it
    out = tmp_path / "out.html"
    assert main(["report", str(tmp_path), "--out", str(out), "--json"]) == 0
    message = json.loads(capsys.readouterr().out)
    assert message["file"] == str(out)
    damage, samples, checkpoint = message["missing"]
    assert "1 of 4 lines of metrics.jsonl" in damage
    assert "samples" in samples
    assert "checkpoint" in checkpoint
    page = out.read_text()
    assert '<b class="unfinished">' in page
    assert "192 of 1,000" in page
    assert all(lack.replace("'", "&#x27;") in page for lack in message["missing"])


def test_schedules_of_other_sizes_have_charts_of_their_own(tmp_path: Path) -> None:
    keys = (
        "game.penalties.r1.strength",
        "optim.generator.betas.1",
        "game.ema_half_life_samples",
    )
    written(tmp_path)
    lines = (
        json.dumps({"samples_seen": 64 * i} | {f"schedule/{key}": 10.0**i for key in keys})
        for i in range(1, 4)
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page, _ = report(str(tmp_path))
    charts = [part.partition("</figure>")[0] for part in page.split("<figure")[1:]]
    for key in keys:
        assert sum(f">{key} <" in one for one in charts) == 1
    assert not any(all(key in one for key in keys[:2]) for one in charts)


def test_empty_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/ray.log").touch()
    page, lacks = report(str(tmp_path))
    assert "logs/ray.log" in page
    assert [lack.partition(" ")[0] for lack in lacks[:2]] == ["attempts.jsonl", "metrics.jsonl"]


def test_damaged_run(tmp_path: Path) -> None:
    """Undamaged content is shown; damage is reported."""
    written(tmp_path)
    (tmp_path / "config.json").write_text("{")
    line = {"samples_seen": "many", "loss/generator": "a lot"}
    text = f"[]\n{json.dumps(line)}\n{'[' * 100_000}\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(text + '{"samples_seen": 999, "loss/generator": [1], "time/step_s": "x"}\n')
    (tmp_path / "attempts.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps({"hosts": 3}).encode())
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "fakes-000000064.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (samples / "fakes-000000064.wav").write_bytes(b"nothing")
    (samples / "fakes-000000064.txt").write_bytes(b"<b>\xff")
    checkpoint = tmp_path / "checkpoints/000000064"
    checkpoint.mkdir(parents=True)
    entry = {"size": 9, "sha256": "0" * 64}
    (checkpoint / "MANIFEST.json").write_text(
        json.dumps({"files": {"a.safetensors": entry, "state.json": entry}})
    )
    (tmp_path / "checkpoints/000000128").mkdir()
    (tmp_path / "checkpoints/000000128/MANIFEST.json").write_text("{")
    page, lacks = report(str(tmp_path))
    for message in (
        "config.json",
        "1 of 2 lines of attempts.jsonl",
        "3 of 7 lines of metrics.jsonl",
        "fakes-000000064.png",
        "fakes-000000064.wav",
        "a.safetensors",
        "000000128/MANIFEST.json",
    ):
        assert sum(message in lack for lack in lacks) == 1, (message, lacks)
    assert "&lt;b&gt;" in page
    assert "Losses" in page


def test_folder_that_is_no_run_directory_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out.html")]) == 2
    assert f"gatdist: {tmp_path}: " in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
    with pytest.raises(StorageError):
        report("memory://nothing/here")


def test_longest_run_fits_into_a_page(tmp_path: Path) -> None:
    written(tmp_path, ticks=6000, **{f"penalty/{i}": i for i in range(5)})
    samples = tmp_path / "samples"
    samples.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
    large = encode_png(noise)
    for clock in (64, 128, 192):
        (samples / f"fakes-{clock:09d}.png").write_bytes(large)
    Image.fromarray(noise[:8, :8]).save(samples / "fakes-000000256.png")
    for clock in range(300, 900):
        (samples / f"fakes-{clock:09d}.txt").write_text("word\n" * 10_000)
    page, _ = report(str(tmp_path))
    assert len(large) > 3e6
    assert len(page) < 2.5e6
    assert page.count("<pre>") == 16
    assert "44,000" in page
    points = re.search(r'<polyline class="generator" points="([^"]*)"', page)
    assert points is not None
    assert len(points[1].split()) <= 240


@given(st.lists(st.floats(allow_infinity=False) | st.none(), min_size=1, max_size=2000))
def test_thinning_keeps_the_extremes_and_the_end(values: list[float | None]) -> None:
    x, mean, low, high = thinned(range(len(values)), values)
    known = [v for v in values if v is not None and abs(v) < 1e300]
    assert len(x) == min(len(values), 240)
    assert x[-1] == len(values) - 1
    if known:
        assert (np.nanmin(low), np.nanmax(high)) == (min(known), max(known))
    finite = np.isfinite(mean)
    assert np.array_equal(finite, np.isfinite(low))
    slack = 1e-9 * np.abs(high[finite]) + 1e-9 * np.abs(low[finite]) + 1e-300
    assert np.all(low[finite] - slack <= mean[finite])
    assert np.all(mean[finite] <= high[finite] + slack)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_axis_ticks_are_few_and_within_the_axis(low: float, length: float, most: int) -> None:
    if low + length == low:
        return
    ticks = nice_ticks(low, low + length, most)
    slack = 1e-6 * (abs(low) + length)
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)
    assert 1 <= len(ticks) <= most + 2


@given(st.integers(0, 100), st.integers(2, 20))
def test_selected_samples_are_spread_from_start_to_end(count: int, most: int) -> None:
    items = list(range(count))
    chosen = spread(items, most)
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    assert chosen[:1] == items[:1]
    assert chosen[-1:] == items[-1:]


def test_alarms_of_successive_logs_are_one_event() -> None:
    alarm = {"health/vanishing_gradient_generator": 1.0}
    ticks = [
        {"samples_seen": 64} | alarm,
        {"samples_seen": 128} | alarm,
        {"samples_seen": 192, "health/skipped_steps": 3.0, "health/stragglers": 0.0},
        {"samples_seen": 256, "health/skipped_steps": 3.0} | alarm,
    ]
    first, skipped, again = events(ticks)
    assert [(one.first, one.last, one.logs) for one in (first, skipped, again)] == [
        (64, 128, 2),
        (192, 192, 1),
        (256, 256, 1),
    ]
    assert first.what == again.what != skipped.what
    assert skipped.what.startswith("3 ")


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "1e999", "-9223372036854775809"])
def test_numbers_out_of_range_are_skipped(tmp_path: Path, number: str) -> None:
    run = written(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"samples_seen": {number}}}\n{{"samples_seen": 999, "x": [{number}]}}\n')
    with (run / "attempts.jsonl").open("a") as file:
        file.write(f'{{"attempt": {number}}}\n')
    report(str(run))


def test_configuration_nested_too_deep_is_damage(tmp_path: Path) -> None:
    run = written(tmp_path)
    (run / "config.json").write_text("[" * 100_000)
    _, lacks = report(str(run))
    assert any("config.json" in lack for lack in lacks)
