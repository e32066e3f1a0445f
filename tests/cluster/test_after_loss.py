"""Under Ray, workers continue without one that is lost, and Ray Train replaces it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from faulty_runs import HEAD, SHORT
from gatdist.runs.changes import CHANGES_FILE
from support import HANG_S, end_group, start_gatdist

pytestmark = pytest.mark.cluster

SETTINGS = [*SHORT, "run.virtual_workers=2", 'plugins=["faults"]']
PLUGIN = """
def slowly(): time.sleep(0.15)
def fail(): raise ArithmeticError("two and two")
"""


def start(folder: Path, faults: str, *words: str) -> subprocess.Popen[str]:
    (folder / "faults.py").write_text(HEAD + PLUGIN + faults)
    sets = [w for setting in SETTINGS for w in ("--set", setting)]
    return start_gatdist("train", "digits", "--json", "--run-dir", "run", *words, *sets, cwd=folder)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=HANG_S)
    finally:
        end_group(process)
    return process.returncode, errors


def attempts(folder: Path) -> list[dict]:
    lines = (folder / "run/attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def digest(run_gatdist, folder: Path) -> str:
    return run_gatdist("inspect", folder / "run", "--digest").stdout.strip()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_gatdist) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, errors = finish(start(folder, "", "--local"))
    assert status == 0, errors
    return digest(run_gatdist, folder)


def test_of_a_fixed_size_the_others_wait_for_replacements(undisturbed, tmp_path, run_gatdist):
    faults = """
fail_at("generator", once(kill), rank=1, step=9, attempt=None)
fail_at("optimizer", once(kill), rank=0, step=30, attempt=None)
fail_at("evaluation", once(kill), rank=1, step=60, attempt=None)
"""
    status, errors = finish(start(tmp_path, faults, "--workers", "2"))
    assert status == 0, errors
    assert digest(run_gatdist, tmp_path) == undisturbed
    found = attempts(tmp_path)
    assert [one["resumed_from"] for one in found] == [None, 30 * 16]  # a new worker 0 alone
    assert [one["world_size"] for one in found] == [2, 2]
    assert errors.count("The others continue") == 3


def test_an_elastic_run_goes_on_at_once_and_takes_the_replacement(
    undisturbed, tmp_path, run_gatdist
):
    faults = """
fail_at("discriminator", once(kill), rank=0, step=20, attempt=None)
always_at("data", lambda: here.attempt == 2 and here.step >= 20 and slowly())
"""
    status, errors = finish(start(tmp_path, faults, "--workers", "1:2"))
    assert status == 0, errors
    assert digest(run_gatdist, tmp_path) == undisturbed
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert [line["world_size"] for line in lines][-1] == 2
    assert [one["world_size"] for one in attempts(tmp_path)] == [2, 1]
    lost, joined = map(json.loads, (tmp_path / "run" / CHANGES_FILE).read_text().splitlines())
    assert re.fullmatch(r"worker 0 on .+ died", lost["reason"])
    assert re.fullmatch(r"a worker on .+ joined", joined["reason"])
    assert [(one["before"], one["workers"]) for one in (lost, joined)] == [(2, 1), (1, 2)]


def test_a_stopped_worker_is_killed_and_replaced(undisturbed, tmp_path, run_gatdist):
    faults = """
fail_at("generator", once(freeze), rank=1, step=9, attempt=None)
"""
    words = ("--set", "cluster.heartbeat_timeout_s=4", "--set", "cluster.straggler_warn_s=2")
    process = start(tmp_path, faults, "--workers", "2", *words)
    status, errors = finish(process)
    assert status == 0, errors
    assert digest(run_gatdist, tmp_path) == undisturbed
    assert len(attempts(tmp_path)) == 1


def test_a_worker_that_fails_by_its_code_ends_the_run(tmp_path):
    """It would fail again if it was replaced."""
    faults = """
fail_at("generator", fail, rank=1, step=9, attempt=None)
"""
    status, errors = finish(start(tmp_path, faults, "--workers", "2"))
    assert status in (1, 2), errors
    assert "two and two" in errors


def test_a_run_that_loses_all_workers_starts_again(undisturbed, tmp_path, run_gatdist):
    faults = """
fail_at("generator", kill, step=50, attempt=1)
"""
    status, errors = finish(start(tmp_path, faults, "--workers", "2"))
    assert status == 0, errors
    assert digest(run_gatdist, tmp_path) == undisturbed
    assert [one["resumed_from"] for one in attempts(tmp_path)] == [None, 640]
