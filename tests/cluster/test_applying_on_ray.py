"""Applying a generator on real Ray Data, by actors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import gatdist
from conditional_runs import RATE, SIDE, clip, image, train_translation, train_vocoder
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from packing import content, write

pytestmark = pytest.mark.cluster


def test_two_workers_write_the_same_bytes_and_resume(
    tmp_path: Path, ray_address: str, run_gatdist: Callable[..., CompletedProcess[str]]
) -> None:
    run = train_vocoder(tmp_path / "run")
    files = {f"{'ab'[i % 2]}/{i}.wav": encode_wav(clip(i, 300 + i), RATE) for i in range(9)}
    source = write(tmp_path / "in", files | {"a/bad.wav": b"x"})
    gatdist.apply(run, source, tmp_path / "alone", batch=2)
    gatdist.apply(run, source, tmp_path / "ray", batch=2)
    for name in ("a/0.wav", "b/1.wav", "a/4.wav", "b/7.wav"):
        (tmp_path / "ray" / name).unlink()
    command = ["apply", run, source, tmp_path / "ray", "--batch", "2", "--workers", "2"]
    finished = run_gatdist(*command, "--address", ray_address, "--json", timeout=300)
    assert finished.returncode == 0, finished.stderr
    outcome = json.loads(finished.stdout)
    assert (outcome["written"], outcome["found"], outcome["skipped"]) == (4, 5, 1)
    assert content(tmp_path / "ray") == content(tmp_path / "alone")
    for noise in ("INFO", "WARNING", "ray::", "Traceback", "Running Dataset"):
        assert noise not in finished.stderr
    # An error of an actor is raised unchanged.
    finished = run_gatdist(*command, "--address", ray_address, "--strict", timeout=300)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("gatdist: a/bad.wav")


@pytest.mark.slow
def test_workers_start_ray_on_this_machine(
    tmp_path: Path, run_gatdist: Callable[..., CompletedProcess[str]]
) -> None:
    run = train_translation(tmp_path / "run")
    source = write(tmp_path / "in", {f"{i}.png": encode_png(image(i, SIDE, 32)) for i in range(3)})
    gatdist.apply(run, source, tmp_path / "alone")
    finished = run_gatdist("apply", run, source, tmp_path / "ray", "--workers", "2", timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert content(tmp_path / "ray") == content(tmp_path / "alone")
