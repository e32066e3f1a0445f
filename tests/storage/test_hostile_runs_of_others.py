"""Untrusted runs name URLs and programs; no command follows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import train
from recorder import Recorder, recording

from gatdist.cli import main

pytestmark = pytest.mark.storage


@pytest.fixture
def run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of someone else: its configuration is not in the user's cache folder."""
    folder = tmp_path / "run"
    assert main([*train(dataset), "--run-dir", str(folder)]) == 0
    monkeypatch.setenv("GATDIST_CACHE", str(tmp_path / "another"))
    return folder


def change(run: Path, section: str, **values: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    config[section] |= values
    (run / "config.json").write_text(json.dumps(config))


HOSTILE_KEYS = [
    ("data", {"url": "{evil}/data"}),
    ("data", {"url": "{evil}/${env:PLANTED}"}),
    ("data", {"url": "${env:PLANTED}"}),
    ("data", {"url": "s3://strangers-bucket/x"}),
    ("data", {"shards_url": "{evil}/${env:PLANTED}"}),
    ("data", {"shards_storage_options": {"headers": {"X": "${env:PLANTED}"}}}),
    ("data", {"storage_options": {"client_kwargs": {"endpoint_url": "{evil}"}}}),
    (
        "evaluate",
        {"features": "torchscript", "features_file": "{evil}/x", "features_sha256": "0" * 64},
    ),
    ("evaluate", {"features": "inception", "features_file": "{evil}/${env:PLANTED}"}),
]


@pytest.mark.parametrize(("section", "values"), HOSTILE_KEYS)
def test_hostile_run_is_not_followed(
    section: str,
    values: dict[str, Any],
    evil: Recorder,
    run: Path,
    dataset: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    text = json.dumps(values).replace("{evil}", evil.url)
    change(run, section, **json.loads(text))
    key = next(key for key in values if key not in ("features", "features_sha256"))
    message = refused("evaluate", run)
    assert f"config.json: {section}.{key}" in message
    assert f"{section}.{key}=" in message
    for command in (
        ["inspect", run],
        ["inspect", run, "--digest"],
        ["verify", run],
        ["report", run, "--out", tmp_path / "report.html"],
        ["sample", run, "--num", "2", "--out", tmp_path / "fakes"],
        ["sample", run, "--num", "2", "--out", tmp_path / "shards", "--shards"],
        ["export", run, "--format", "safetensors", "--out", tmp_path / "generator"],
    ):
        assert main([str(argument) for argument in command]) == 0
    # The user's own configuration counts, for training, too.
    assert main([*train(dataset), "--run-dir", str(run)]) == 0


def test_own_run_is_followed_and_another_one_with_permission(
    run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["evaluate", str(run)]) == 0  # local data next to a local run
    with recording(dataset) as own:
        change(run, "data", url=own.url)
        assert main(["evaluate", str(run)]) == 2
        assert not own.requests
        assert main(["evaluate", str(run), "--set", f'data.url="{own.url}"']) == 0
        assert own.requests
        # The configuration trained with here is the user's own.
        mine = tmp_path / "mine"
        monkeypatch.setenv("PLANTED", "1")
        url = own.url + "?sig=${env:PLANTED}"
        assert main([*train(url), "--run-dir", str(mine)]) == 0
        assert main(["evaluate", str(mine)]) == 0
