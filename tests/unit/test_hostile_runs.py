"""An untrusted run: whatever its files contain, it is used, or rejected in one message."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from benchmarks.cases import fuzz
from gatdist.cli import main
from gatdist.common.errors import CheckpointError, GatdistError
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import load_run, trained
from gatdist.runs.inspection import inspect
from gatdist.storage import Store
from gatdist.training import loop
from support import refused

CASES = 60
CPU = torch.device("cpu")
TINY = ["run.total_samples=320", "run.global_batch=16", "evaluate.metrics=[]"]
TINY += ["run.checkpoint_every_samples=32", "run.log_every_samples=16", "run.keep_checkpoints=1"]
TINY += ["monitor.tensorboard=false", "model.latent_size=4"]
TINY += [f'model.{p}={{name="residual", width=4}}' for p in ("generator", "discriminator")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted half-way."""
    folder = tmp_path_factory.mktemp("whole")
    config, store = load_config("digits", TINY), Store(str(folder))
    outcome = loop.run(config, LocalCommunicator(CPU), store, should_stop=lambda: True)
    assert outcome["status"] == "interrupted"
    return folder


def resume(run: Path) -> None:
    loop.run(load_config("digits", TINY), LocalCommunicator(CPU), Store(str(run)))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def checkpoint(run: Path) -> Path:
    (folder,) = (run / "checkpoints").iterdir()
    return folder


def with_digests(folder: Path) -> None:
    """Update a checkpoint's manifest to its files, as an attacker would."""
    path = folder / "MANIFEST.json"
    message = json.loads(path.read_text())
    for name in message["files"]:
        content = (folder / name).read_bytes()
        message["files"][name] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    path.write_text(json.dumps(message))


def change(path: Path, alter: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    alter(values)
    path.write_text(json.dumps(values))


def test_damage_of_every_kind_gives_a_result_or_a_message(whole: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    outcomes = set()
    for case in range(CASES):
        run = Path(shutil.copytree(whole, tmp_path / str(case)))
        folder = checkpoint(run)
        paths = [run / "config.json", *sorted(folder.iterdir())]
        path = chance.choice(paths)
        ways = [fuzz.bits, fuzz.noise, fuzz.lengths, fuzz.cut, fuzz.splice]
        way = chance.choice(ways + [fuzz.values] * 10 * (path.suffix == ".json"))
        path.write_bytes(way(path.read_bytes(), chance))
        if path.name not in ("config.json", "MANIFEST.json"):
            with_digests(folder)
        acts = (lambda run: load_run(Store(str(run)), CPU), lambda run: inspect(str(run)), resume)
        for act in acts[: 2 + (case % 3 == 0)]:
            try:
                act(run)
                outcomes.add("used")
            except GatdistError as error:
                outcomes.add(type(error).__name__)
            except Exception as error:
                pytest.fail(f"case {case}: {path.name}, {way.__name__}: {error!r}")
        shutil.rmtree(run)
    assert outcomes >= {"used", "CheckpointError", "ConfigError"}


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "x/state.json", ""])
def test_no_file_outside_of_the_checkpoint_is_read(run: Path, name: str) -> None:
    (run.parent / "secret.safetensors").write_bytes(b"x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    manifest = checkpoint(run) / "MANIFEST.json"
    change(manifest, lambda message: message["files"].update({name: entry}))
    with refused(CheckpointError, "checkpoints"):
        load_run(Store(str(run)), CPU)
    assert "MANIFEST.json" in inspect_damage(run)


def inspect_damage(run: Path) -> str:
    from gatdist.runs.inspection import damaged_checkpoints

    ((_, message),) = damaged_checkpoints(Store(str(run)))["damaged"]
    return message


def test_files_longer_than_in_the_manifest_are_not_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (checkpoint(run) / "average.safetensors").open("r+b") as file:
        file.truncate(2**40)  # a sparse file of a terabyte
    assert "1099511627776" in inspect_damage(run)


def test_nothing_is_allocated_for_networks_that_do_not_fit_the_weights(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []
    build = trained.build_networks_of

    def watched(*arguments: Any) -> Any:
        devices.append(torch.get_default_device().type)
        return build(*arguments)

    monkeypatch.setattr(trained, "build_networks_of", watched)
    load_run(Store(str(run)), CPU)
    assert devices == ["meta", "cpu"]
    devices.clear()

    def alter(config: Any) -> None:
        config["model"]["generator"] |= {"width": 10**6, "max_width": 10**6}  # 36 terabytes

    change(run / "config.json", alter)
    with refused(CheckpointError, "run"):
        load_run(Store(str(run)), CPU)
    assert devices == ["meta"]


@pytest.mark.parametrize("file", ["config.json", "MANIFEST.json", "state.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"3", b"\xff\xfe", b""])
def test_json_of_another_structure_is_rejected(run: Path, file: str, content: bytes) -> None:
    folder = run if file == "config.json" else checkpoint(run)
    (folder / file).write_bytes(content)
    if file == "state.json":
        with_digests(folder)
    with pytest.raises(GatdistError):
        load_run(Store(str(run)), CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("samples_seen", value) for value in ("3", -1, 0, 1.5, True, 10**30, None)),
        *(("convergence", value) for value in ({}, None, {"best": "x", "best_samples": 0})),
        *(("counted", value) for value in ({"nonfinite": 0}, [], 0)),
        ("counted", {"nonfinite": 0, "spikes": 0, "rollbacks": 0, "more": 0}),
        ("convergence", {"best": float("nan"), "best_samples": 0}),
        *(("evaluating", {}), ("order", {"fingerprint": 5})),
        *(("unwritten_metrics", value) for value in ([3], {}, "x")),
        *(("checkpoint_every_samples", value) for value in (0, "auto", 2**63)),
        *(("evaluating", 3), ("wall_time_s", "long"), ("wall_time_s", -1), ("attempt", -1)),
        *(("order", []), ("metrics", []), ("status", None), ("rollbacks", "0"), ("reason", 3)),
    ],
)
def test_state_that_training_did_not_write_is_rejected(
    run: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(run)
    change(folder / "state.json", lambda state: state.update({key: value}))
    with_digests(folder)
    sets = [word for setting in TINY for word in ("--set", setting)]
    for more in ([], ["--dry-run"]):
        words = ["train", "digits", "--local", "--run-dir", str(run), *sets, *more]
        assert main(words) == 2
        assert f"{folder.name}/state.json: {key}" in capsys.readouterr().err
    with pytest.raises(CheckpointError) as caught:
        load_run(Store(str(run)), CPU)
    assert f"state.json: {key}" in caught.value.subject


def spoiled(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how == "shape":
        return torch.zeros(3, 3, 3)
    if how in ("nan", "inf"):
        return torch.full_like(tensor, float(how))
    return tensor.to(getattr(torch, how))


@pytest.mark.parametrize("how", ["nan", "inf", "float64", "bool", "complex64", "shape"])
@pytest.mark.parametrize("file", ["generator", "average", "optimizer_discriminator"])
def test_tensors_that_training_never_saves_are_rejected(run: Path, file: str, how: str) -> None:
    path = checkpoint(run) / f"{file}.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(key for key, tensor in tensors.items() if tensor.dim() > 1)
    safetensors.torch.save_file(tensors | {name: spoiled(tensors[name], how)}, path)
    with_digests(checkpoint(run))
    with refused(CheckpointError, f"tensor {file}/{name}"):
        resume(run)


@pytest.mark.parametrize("file", ["config.json", "attempts.jsonl", "metrics.jsonl"])
def test_pipes_and_devices_in_a_run_are_not_read(run: Path, file: str) -> None:
    (run / file).unlink(missing_ok=True)
    os.mkfifo(run / file)
    with pytest.raises(GatdistError):
        resume(run)
    (run / file).unlink()
    (run / file).symlink_to("/dev/zero")
    with pytest.raises(GatdistError):
        resume(run)
