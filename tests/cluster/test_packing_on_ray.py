"""Packing on real Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from packing import content, image, pack, write

pytestmark = pytest.mark.cluster


def test_ray_packs_the_same_bytes_and_resumes_local_packing(
    tmp_path: Path, ray_address: str, run_gatdist: Callable[..., CompletedProcess[str]]
) -> None:
    files = {f"{'ab'[i % 2]}/{i}.png": image(i, (9, 9)) for i in range(60)}
    source = write(tmp_path / "in", files | {"a/bad.png": b"x"})
    pack(source, tmp_path / "alone", size=6)
    pack(source, tmp_path / "ray", size=6)
    for name in ("shard-000001.tar", "packing/shard-000002.json", "manifest.json"):
        (tmp_path / "ray" / name).unlink()
    command = ["pack", source, tmp_path / "ray", "--size", "6", "--shard-bytes", "9kB"]
    finished = run_gatdist(*command, "--address", ray_address, "--json", timeout=300)
    assert finished.returncode == 0, finished.stderr
    outcome = json.loads(finished.stdout)
    assert (outcome["samples"], outcome["skipped"]) == (60, 1)
    assert content(tmp_path / "ray") == content(tmp_path / "alone")
    for noise in ("INFO", "WARNING", "ray::", "Traceback", "Running Dataset"):
        assert noise not in finished.stderr
    # An error of a Ray task is raised unchanged.
    write(source, {"a/torn.png": image(0, (9, 9))[:-9]})
    command = ["pack", source, tmp_path / "strict", "--size", "6", "--strict"]
    finished = run_gatdist(*command, "--address", ray_address, timeout=300)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("gatdist: a/")
