"""Training in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gatdist.config import load_config
from gatdist.training.interrupts import Interrupts
from gatdist.training.local import run_here


@pytest.fixture
def two_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("reduction", "threads"), [("fast", 2), ("canonical", 1)])
def test_a_canonical_run_has_as_many_threads_as_a_worker(
    two_threads: None, tmp_path: Path, reduction: str, threads: int
) -> None:
    """Two threads round otherwise than one, and workers have ``cluster.cpus_per_worker``."""
    seen = set()

    class Console:
        def event(self, kind: str, fields: dict[str, Any]) -> None:
            seen.add(torch.get_num_threads())

    settings = ["run.total_samples=128", f"run.reduction={reduction}", "evaluate.metrics=[]"]
    run_here(
        load_config("digits", settings),
        str(tmp_path / "run"),
        Console(),
        Interrupts(lambda kind, fields: None),
    )
    assert seen == {threads}
    assert torch.get_num_threads() == 2
