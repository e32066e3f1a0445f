"""A run that has had a checkpoint never starts over without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gatdist.cli import main
from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.config import load_config
from gatdist.runs import Checkpoints, RunDirectory, read_config
from gatdist.storage import Store

TINY = ["run.total_samples=64", "run.global_batch=16", "run.checkpoint_every_samples=32"]
TINY += ["evaluate.metrics=[]", "monitor.tensorboard=false", "model.latent_size=4"]
TINY += [f'model.{p}={{name="residual", width=4}}' for p in ("generator", "discriminator")]


def train(folder: Path, *more: str) -> int:
    sets = [word for setting in TINY for word in ("--set", setting)]
    return main(["train", "digits", "--local", "--run-dir", str(folder), *sets, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder) == 0
    return folder


def _without_manifests(run: Path) -> None:
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()


def _only_leftovers(run: Path) -> None:
    """Keep only what another attempt was writing when it died."""
    _without_manifests(run)
    for i, folder in enumerate(list((run / "checkpoints").iterdir())):
        folder.rename(folder.with_name(f"000000999.7-00000000000{i}"))


def _empty(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def _only_the_record(run: Path) -> None:
    """As copied without other folders, by a start that resumed from a checkpoint."""
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "attempts")
    entry = json.loads((run / "attempts.jsonl").read_text().splitlines()[0])
    (run / "attempts.jsonl").write_text(json.dumps(entry | {"resumed_from": 32}) + "\n")


def _only_files(run: Path) -> None:
    """As copied without any folder."""
    for folder in ("checkpoints", "attempts"):
        shutil.rmtree(run / folder)


def _without_the_record(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "attempts.jsonl").unlink()


LOSSES: dict[str, Callable[[Path], None]] = {
    "folder gone": lambda run: shutil.rmtree(run / "checkpoints"),
    "folder empty": _empty,
    "manifests gone": _without_manifests,
    "leftovers only": _only_leftovers,
    "only the record is left": _only_the_record,
    "only files are left": _only_files,
    "no record either": _without_the_record,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_run_is_rejected_and_never_starts_over(
    finished: Path, tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    LOSSES[loss](run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    metrics = (run / "metrics.jsonl").read_bytes()
    for more in ([], ["--dry-run"], []):  # nor at the second try
        capsys.readouterr()
        assert train(run, *more) == 2
        message = capsys.readouterr().err
        assert "checkpoints" in message
        assert "Traceback" not in message
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_run_that_died_before_its_first_commit_starts_at_0(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    _without_manifests(run)  # as in the middle of the first commit
    for marker in (run / "attempts").glob("*.committed"):
        marker.unlink()
    assert train(run) == 0
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [entry["resumed_from"] for entry in attempts] == [None, None]
    assert (run / "attempts" / "000002.committed").exists()


def test_verify_reports_a_lost_run_as_damaged(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["verify", str(run)]) == 0
    _without_manifests(run)
    assert main(["verify", str(run)]) == 2
    shutil.rmtree(run / "checkpoints")
    assert main(["verify", str(run)]) == 2


def test_storage_that_lists_nothing_does_not_make_a_run_start_over(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "list", lambda self, name="": [])
    monkeypatch.setattr(Store, "find", lambda self, name="", with_unfinished=False: {})
    assert train(finished) == 2


@pytest.mark.parametrize("resumed_from", [0, 32, "32", [1], 10**40])
def test_lost_run_is_rejected_whatever_its_record_was_resumed_from(
    tmp_path: Path, resumed_from: object
) -> None:
    store = Store(str(tmp_path))
    store.publish(
        "attempts.jsonl", json.dumps({"attempt": 1, "resumed_from": resumed_from}).encode()
    )
    with pytest.raises(CheckpointError) as raised:
        RunDirectory(store).require_fresh()
    assert raised.value.exit_status == 2


@pytest.mark.parametrize("entry", [{}, {"attempt": "x"}, {"attempt": -3}, {"attempt": None}, [], 3])
def test_malformed_record_does_not_prevent_an_attempt(tmp_path: Path, entry: object) -> None:
    store = Store(str(tmp_path))
    store.publish("attempts.jsonl", json.dumps(entry).encode() + b"\n")
    store.publish("attempts/000003.json", json.dumps(entry).encode())
    assert RunDirectory(store).start_attempt(["a"], None, "new") == 4
    assert Checkpoints(store.child("checkpoints")).newest() is None


def test_second_start_in_the_same_folder_is_rejected(tmp_path: Path) -> None:
    """Both have found the folder empty; only one configuration may become the run's."""
    store = Store(str(tmp_path))
    first, second = (load_config("ring", [f"run.seed={seed}"]) for seed in (1, 2))
    RunDirectory(store).claim(first)
    with pytest.raises(ConfigError):
        RunDirectory(store).claim(second)
    assert read_config(store) == first
    RunDirectory(store).claim(first)


@pytest.mark.parametrize("num", ["0", "-1", "9" * 30])
def test_invalid_number_of_samples_is_rejected(
    finished: Path, num: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished), "--num", num]) == 2
    assert "--num" in capsys.readouterr().err


def test_evaluation_of_zero_samples_is_rejected(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished)]) == 2
    assert "evaluate.metrics" in capsys.readouterr().err
