"""Generators outside of steps are called with a limited number of samples, where configured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gatdist.config import Config, load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, Sampler
from gatdist.runs.checkpoints import Snapshots
from gatdist.storage import Store
from gatdist.training.loop import run

LOCAL = LocalCommunicator(torch.device("cpu"))


class Generator(nn.Module):
    """Latents and classes, plus numbers of torch's generator if ``draws``."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.draws = draws
        self.sizes: list[int] = []

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.sizes.append(len(latents))
        assert labels is not None
        drawn = torch.randn(len(latents), 1) if self.draws else 0.0
        return self.weight * latents + 10 * labels[:, None] + drawn


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_samples_do_not_depend_on_how_many_are_made_at_once(draws: bool, at_once: int) -> None:
    network = Generator(draws)
    positions, labels = torch.arange(5, 12), torch.arange(7) % 4

    def sampler(limit: int | None) -> Sampler:
        return Sampler(network, 4, 4, 0, "x", at_once=limit)

    expected = [
        sampler(None)(positions),
        sampler(None)(positions, labels),
        sampler(None).between(1, 2, torch.linspace(0, 1, 7)),
    ]
    network.sizes.clear()
    limited = sampler(at_once)
    found = [
        limited(positions),
        limited(positions, labels),
        limited.between(1, 2, torch.linspace(0, 1, 7)),
    ]
    assert max(network.sizes) == (1 if draws else min(7, at_once))
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("overrides", "workers", "expected"),
    [
        ([], 4, 16),
        (["game.generator_batch=32"], 4, 8),
        (["optim.generator.micro_batch=2"], 4, 2),
        # The same on any number of workers.
        (["run.reduction=canonical", "run.virtual_workers=8"], 1, 8),
        (["run.reduction=canonical", "run.virtual_workers=8"], 4, 8),
    ],
)
def test_gpus_hold_as_many_samples_as_in_a_step(
    overrides: list[str], workers: int, expected: int
) -> None:
    config = load_config("digits", ["run.global_batch=64", *overrides])
    assert config.at_once(workers, "cuda") == expected
    assert config.at_once(workers, "cpu") is None


def test_previews_and_evaluations_of_a_run_keep_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    call = Sampler._call

    def note(self: Sampler, inputs):  # type: ignore[no-untyped-def]
        sizes.append(len(inputs.latents))
        return call(self, inputs)

    monkeypatch.setattr(Sampler, "_call", note)
    monkeypatch.setattr(Config, "at_once", lambda self, workers, device: 5)
    settings = [
        *("run.total_samples=32", "run.global_batch=16", "run.log_every_samples=16"),
        *(f'model.{p}={{name="residual", width=4}}' for p in ("generator", "discriminator")),
        *("evaluate.features=points", "evaluate.num_samples=64", "evaluate.metrics=['fid']"),
    ]
    run(load_config("digits", settings), LOCAL, Store(str(tmp_path)))
    assert max(sizes) == 5
    assert sum(sizes) >= 64 + 2 * 100  # an evaluation and two previews


def test_snapshots_are_copies(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    taken = Snapshots().take({"generator/weight": weight})
    expected = weight.clone()
    weight.zero_()
    assert taken["generator/weight"].equal(expected)
    checkpoints = Checkpoints(Store(str(tmp_path)))
    checkpoints.save(1, {"generator/weight": expected}, {"samples_seen": 1}).result()
    weight.fill_(2)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.tensors["generator/weight"].equal(expected)
    checkpoints.close()
