"""An attacker's server, and commands that must not send it a request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from recorder import Recorder, recording

from gatdist.cli import main
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

SECRET = "planted-5ecret-value"
OWN_TOKEN = "planted-t0ken-of-the-owner"
POINTS = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
SMALL = [
    *("run.total_samples=32", "run.global_batch=16", "run.log_every_samples=16"),
    *(
        "run.checkpoint_every_samples=16",
        'evaluate={metrics=["swd"], features="points", num_samples=32}',
    ),
]


@pytest.fixture
def evil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The attacker's server. After the test, it must have received no request."""
    monkeypatch.setenv("PLANTED", SECRET)
    with recording() as server:
        yield server
        assert server.requests == []


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    samples = ((f"{i:03d}", {"npy": encode_array(p)}) for i, p in enumerate(POINTS))
    folder = tmp_path / "data"
    write_dataset(Store(str(folder)), [samples], modality="points", sample_shape=(2,))
    return folder


def spoil(folder: Path, shards_url: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards_url"] = shards_url
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be rejected in one message without a secret; return the message."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        assert SECRET not in output + errors
        assert OWN_TOKEN not in output + errors
        return errors

    return run


def train(folder: object, *more: str) -> list[str]:
    sets = [*SMALL, f'data.url="{folder}"', *more]
    return ["train", "ring", "--local", *(word for s in sets for word in ("--set", s))]
