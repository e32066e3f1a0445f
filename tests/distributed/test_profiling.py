"""Profiles on demand: their content, and that they do not change results."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gatdist.cli import main
from gatdist.common.errors import ConfigError, StorageError
from gatdist.common.position import here
from gatdist.config import Config, parse_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.inspection import digest
from gatdist.storage import Store
from gatdist.training.loop import run
from gatdist.training.profiling import require_ahead
from support import refused, spawn

STEPS, BATCH = 10, 16
SMALL = {"name": "mlp", "width": 8, "depth": 2}
PHASES = ["data", "discriminator", "generator", "optimizer"]


def config(window: list[int] | None = None, steps: int = STEPS) -> Config:
    return parse_config(
        {
            "run": {
                "total_samples": steps * BATCH,
                "global_batch": BATCH,
                "log_every_samples": 5 * BATCH,
                "checkpoint_every_samples": 5 * BATCH,
            },
            "data": {"url": "builtin:ring"},
            "model": {"latent_size": 4, "generator": SMALL, "discriminator": SMALL},
            "game": {"penalties": {"r1": {"strength": 0.1}}},
            "evaluate": {"metrics": []},
            "monitor": {"tensorboard": False, "profile_steps": window},
        }
    )


def trained(comm: Any, folder: str) -> list[str]:
    """Train without a profile, with one, and with one over two attempts; return messages."""
    messages: list[str] = []

    def emit(kind: str, fields: dict[str, Any]) -> None:
        messages.append(fields.get("message", ""))

    run(config(), comm, Store(f"{folder}/plain"), emit=emit)
    run(config([4, 6]), comm, Store(f"{folder}/profiled"), emit=emit)
    run(config(steps=5), comm, Store(f"{folder}/resumed"), emit=emit)
    run(config([3, 7]), comm, Store(f"{folder}/resumed"), emit=emit)
    return messages


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run directories of two workers, and messages of worker 0."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, spawn(2, trained, str(folder))[0]


def events(trace: Path) -> list[dict[str, Any]]:
    content = json.loads(gzip.decompress(trace.read_bytes()))
    assert content["profile_memory"] == 1
    found: list[dict[str, Any]] = content["traceEvents"]
    return found


def names_in(events: list[dict[str, Any]]) -> Counter[str]:
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation")


def test_profile_does_not_change_the_result(runs: tuple[Path, list[str]]) -> None:
    folder, _ = runs
    assert len({digest(f"{folder}/{name}") for name in ("plain", "profiled", "resumed")}) == 1
    assert not (folder / "plain/profiles").exists()


def test_each_worker_writes_a_trace_of_the_steps_with_their_phases(
    runs: tuple[Path, list[str]],
) -> None:
    profiles = runs[0] / "profiled/profiles"
    (window,) = profiles.iterdir()
    assert window.name == "steps-000004-000006-attempt-1"
    assert sorted(path.name for path in window.iterdir()) == [
        f"rank-{rank}{ending}" for rank in (0, 1) for ending in (".pt.trace.json.gz", ".txt")
    ]
    for rank in (0, 1):
        found = events(window / f"rank-{rank}.pt.trace.json.gz")
        names = names_in(found)
        assert names["ProfilerStep#4"] == names["ProfilerStep#5"] == 1
        assert not {"ProfilerStep#3", "ProfilerStep#6"} & names.keys()
        # The optimizer: two players, the average, and the adaptive state.
        assert [names[phase] for phase in PHASES] == [2, 2, 2, 8]
        assert names["communication"] > 0
        assert names["commit"] == (rank == 0)  # in five steps
        assert any(e["name"] == "[memory]" and "Total Allocated" in e["args"] for e in found)
        step = next(e for e in found if e["name"] == "ProfilerStep#4")
        for phase in PHASES:  # each in its step
            first = next(e for e in found if e["name"] == phase and e["tid"] == step["tid"])
            assert step["ts"] <= first["ts"]
            assert first["ts"] + first["dur"] <= step["ts"] + step["dur"]
        tables = (window / f"rank-{rank}.txt").read_text()
        assert "aten::" in tables


def test_resumed_run_profiles_the_rest_of_the_window(runs: tuple[Path, list[str]]) -> None:
    """Only the rest of the window [3, 7): the run resumes at step 5."""
    folder, messages = runs
    (window,) = (folder / "resumed/profiles").iterdir()
    assert window.name == "steps-000005-000007-attempt-2"
    steps = [name for name in names_in(events(window / "rank-1.pt.trace.json.gz")) if "#" in name]
    assert sorted(s for s in steps if s.startswith("Prof")) == ["ProfilerStep#5", "ProfilerStep#6"]
    assert any(f" 5 to 6: {window}" in message for message in messages)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("steps=100", "--profile = 'steps=100'"),
        ("100:110", "--profile = '100:110'"),
        ("steps=-1:3", "--profile = 'steps=-1:3'"),
        ("steps=7:7", "monitor.profile_steps (--profile) = [7, 7]"),
        ("steps=0:501", "monitor.profile_steps (--profile) = [0, 501]"),
        ("steps=8:11", "monitor.profile_steps (--profile) = [8, 11]"),
    ],
)
def test_invalid_window_is_reported_with_status_2(
    value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "run.total_samples=160", "--set", "run.global_batch=16"]
    arguments = ["train", "ring", "--local", "--run-dir", str(tmp_path / "run"), *sets]
    assert main([*arguments, "--profile", value]) == 2
    assert f"gatdist: {message}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_window_in_the_past_is_rejected(runs: tuple[Path, list[str]]) -> None:
    with refused(ConfigError, "monitor.profile_steps (--profile)"):
        require_ahead(config([4, 6]), f"{runs[0]}/plain")
    require_ahead(config([4, 6]), f"{runs[0]}/nothing-yet")


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([1, 9], " 1 to 2: "),
        ([7, 9], "step 7"),
    ],
)
def test_stopped_run_writes_an_incomplete_profile(
    window: list[int], message: str, tmp_path: Path
) -> None:
    messages: list[str] = []
    outcome = run(
        config(window),
        LocalCommunicator(torch.device("cpu")),
        Store(str(tmp_path)),
        should_stop=lambda: here.step == 3,
        emit=lambda kind, fields: messages.append(fields.get("message", "")),
    )
    assert outcome["status"] == "interrupted"
    assert outcome["samples_seen"] == 3 * BATCH
    assert any(message in text for text in messages)
    traces = [path.parent.name for path in tmp_path.glob("profiles/*/*.gz")]
    assert traces == (["steps-000001-000003-attempt-1"] if window[0] < 3 else [])


def test_failure_to_write_a_profile_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    publish = Store.publish

    def refuse(store: Store, name: str, data: bytes) -> None:
        if name.startswith("profiles/"):
            raise StorageError(name, "is not to be written")
        publish(store, name, data)

    monkeypatch.setattr(Store, "publish", refuse)
    outcome = run(
        config([8, 10]),
        LocalCommunicator(torch.device("cpu")),
        Store(str(tmp_path)),
        emit=lambda kind, fields: messages.append(fields.get("message", "")),
    )
    assert outcome["status"] == "finished"
    assert any("profiles/" in message for message in messages)
