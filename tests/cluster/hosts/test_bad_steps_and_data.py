"""Non-finite steps and damaged data: all workers take the same decision."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from host_runs import Runs

from faulty_runs import CANONICAL
from gatdist.data.builtin import write_digits
from gatdist.storage import Store

pytestmark = pytest.mark.hosts

SHORT = "run.total_samples=5120"
POISON = """
from gatdist.game import Loss, register_loss
from gatdist.game.losses import losses
usual, factors = losses["relativistic"], []
def poisoned(real, fake):
    loss = usual.discriminator(real, fake)
    return loss * factors[0] if factors else loss
register_loss("poisoned", Loss(poisoned, usual.generator, generator_reads_real=True))
def poison(factor, rank, step):
    fail_at("discriminator", lambda: factors.append(factor), rank=rank, step=step, attempt=None)
    fail_at("optimizer", factors.clear, rank=rank, step=step, attempt=None)
for rank, step in {places}:
    poison(float("nan"), rank, step)
poison(1e6, 1, 130)
"""


@pytest.mark.parametrize("action", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_nonfinite_step_on_one_worker_is_skipped_on_all(
    runs: Runs, tmp_path: Path, action: str
) -> None:
    """Fault 19: a step that is non-finite on any worker is skipped on all, with the same result."""
    settings = [
        SHORT,
        "game.loss=poisoned",
        f"health.nonfinite={action}",
        "health.spike=skip",
        "health.rollback_budget=2",
    ]
    digests = []
    for ranks in ((0, 1), (1, 0)):
        places = list(zip(ranks, (50, 90), strict=True))
        there = Runs(runs.hosts, tmp_path / f"{ranks[0]}")
        with there:
            there.folder.mkdir()
            there.faults(POISON.replace("{places}", str(places)))
            there.start(*settings)
            assert there.finish() == 0, there.errors
            lines = (there.run_dir / "metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])
            if action == "skip":
                assert last["health/skipped_steps"] == 3
            else:
                assert last["health/rollbacks"] == 2
                assert re.search(r"1,280 .*\b1\b", there.errors)
                assert re.search(r"2,560 .*\b2\b", there.errors)
            assert len(there.attempts()) == 1
            digests.append(there.digest())
    assert digests[0] == digests[1]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A data set that a test may damage."""
    write_digits(Store(str(tmp_path / "digits")))
    return tmp_path / "digits"


@pytest.mark.slow
def test_damaged_samples_are_replaced_identically_on_every_rank(
    runs: Runs, digits: Path, reference_digest
) -> None:
    """Fault 20: a shard with a hole; substitutes are the same for any number of workers."""
    shard = digits / "shard-000002.tar"
    content = bytearray(shard.read_bytes())
    content[40_000:48_000] = bytes(8_000)
    shard.write_bytes(content)
    settings = (SHORT, f"data.url={digits}", "data.on_bad_sample=substitute", *CANONICAL)
    runs.start(*settings)
    assert runs.finish() == 0, runs.errors
    last = json.loads((runs.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["health/bad_samples"] > 0
    assert runs.digest() == reference_digest(*settings)


def test_lost_shard_ends_the_run_and_is_named(runs: Runs, digits: Path) -> None:
    """Fault 20: reported once and not retried, since no retry can fix it."""
    (digits / "shard-000003.tar").unlink()
    runs.start(SHORT, f"data.url={digits}")
    assert runs.finish() == 2, runs.errors
    assert runs.errors.count("shard-000003.tar") == 1
    assert "Traceback" not in runs.errors
    assert len(runs.attempts()) <= 1
