"""Local training in this process."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatdist
from gatdist import api
from gatdist.common.errors import ConfigError, GatdistError, PluginError, TrainingError
from gatdist.common.registry import users_frame
from gatdist.config import load_config
from gatdist.models.registry import generators
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints
from gatdist.storage import Store
from gatdist.training.loop import run
from support import refused

CPU = torch.device("cpu")
HERE = f", at {__file__}:"


@pytest.fixture
def two_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("reduction", "threads"), [("fast", 2), ("canonical", 1)])
def test_canonical_run_uses_as_many_threads_as_a_worker(
    two_threads: None, tmp_path: Path, reduction: str, threads: int
) -> None:
    """Two threads round differently than one, and workers have ``cluster.cpus_per_worker``."""
    seen = set()

    class Console:
        def event(self, kind: str, fields: dict[str, Any]) -> None:
            seen.add(torch.get_num_threads())

    settings = ["run.total_samples=128", f"run.reduction={reduction}", "evaluate.metrics=[]"]
    config = load_config("digits", settings)
    api.train(config, tmp_path / "run", local=True, console=Console())
    assert seen == {threads}
    assert torch.get_num_threads() == 2


def ends(fakes: Tensor) -> Tensor:
    sys.exit(0)


def leaves(fakes: Tensor) -> Tensor:
    raise GeneratorExit


def fails(fakes: Tensor) -> Tensor:
    raise KeyError("lost")


def mentions_oom(fakes: Tensor) -> Tensor:
    raise RuntimeError("my Gloomy layer")


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no message")


def unreadable(fakes: Tensor) -> Tensor:
    raise UnreadableError


class Dropout(BaseException):
    pass


def drops_out(fakes: Tensor) -> Tensor:
    raise Dropout


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fakes: Tensor) -> Tensor:
        return fakes * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("backward")


@pytest.mark.parametrize(
    ("act", "error", "field", "fact"),
    [
        (ends, PluginError, "user code", f"SystemExit: 0{HERE}"),
        (leaves, PluginError, "user code", f"GeneratorExit{HERE}"),
        (fails, PluginError, "user code", f"KeyError: 'lost'{HERE}"),
        (FailsBackward.apply, PluginError, "user code", f"ValueError: backward{HERE}"),
        (mentions_oom, PluginError, "user code", f"RuntimeError: my Gloomy layer{HERE}"),
        (unreadable, PluginError, "user code", HERE),
        (drops_out, PluginError, "user code", f"Dropout{HERE}"),
        (lambda fakes: fakes.detach(), PluginError, "user code", "RuntimeError"),
        (lambda fakes: fakes[:1], ConfigError, "model.generator.name", "(1, 2)"),
        (lambda fakes: None, ConfigError, "model.generator.name", "NoneType"),
        (lambda fakes: [fakes], ConfigError, "model.generator.name", "list"),
        (lambda fakes: fakes.int(), ConfigError, "model.generator.name", "int32"),
        (lambda fakes: fakes.to(torch.complex64), ConfigError, "model.generator.name", "complex64"),
        (lambda fakes: fakes.to("meta"), ConfigError, "model.generator.name", "meta"),
    ],
)
def test_misbehaviour_of_a_network_after_the_startup_check_is_reported(
    tmp_path: Path,
    act: Callable[[Tensor], Tensor],
    error: type[GatdistError],
    field: str,
    fact: str,
) -> None:
    class Late(nn.Module):
        def __init__(self, latent_size: int, sample_shape: tuple[int, ...], **_: Any) -> None:
            super().__init__()
            self.linear = nn.Linear(latent_size, *sample_shape)

        def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
            fakes: Tensor = self.linear(latents)
            return act(fakes) if len(latents) > 32 else fakes  # the startup check uses few

    with refused(error, field) as caught:
        run_late(Late, tmp_path)
    assert fact in str(caught.value)


def adds_a_buffer(network: nn.Module) -> None:
    network.register_buffer("late", torch.zeros(()))


def adds_a_parameter(network: nn.Module) -> None:
    network.late = nn.Parameter(torch.zeros(()))


def removes_a_buffer(network: nn.Module) -> None:
    del network.seen


def resizes_a_buffer(network: nn.Module) -> None:
    network.seen = torch.zeros(3)


def casts_a_buffer(network: nn.Module) -> None:
    network.seen = torch.zeros((), dtype=torch.float64)


def replaces_a_parameter(network: nn.Module) -> None:
    network.scale = nn.Parameter(torch.ones(()))


def freezes_a_parameter(network: nn.Module) -> None:
    network.scale.requires_grad_(False)


def spoils_a_buffer(network: nn.Module) -> None:
    network.seen.fill_(torch.nan)


def changes_values(network: nn.Module) -> None:
    network.seen.fill_(3.0)
    network.mask.fill_(-torch.inf)


@pytest.mark.parametrize(
    ("act", "error", "named"),
    [
        (adds_a_buffer, PluginError, "late:"),
        (adds_a_parameter, PluginError, "late:"),
        (removes_a_buffer, PluginError, "seen"),
        (resizes_a_buffer, PluginError, "seen"),
        (casts_a_buffer, PluginError, "seen"),
        (replaces_a_parameter, PluginError, "scale:"),
        (freezes_a_parameter, PluginError, "scale:"),
        (spoils_a_buffer, TrainingError, "seen"),
        (changes_values, None, ""),
    ],
)
def test_state_that_cannot_be_resumed_is_not_committed(
    tmp_path: Path, act: Callable[[nn.Module], None], error: type[GatdistError] | None, named: str
) -> None:
    class Late(nn.Module):
        def __init__(self, latent_size: int, sample_shape: tuple[int, ...], **_: Any) -> None:
            super().__init__()
            self.linear = nn.Linear(latent_size, *sample_shape)
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))
            self.calls = 0

        def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
            fakes: Tensor = self.linear(latents) * self.scale
            self.calls += len(latents) > 32  # the startup check uses few
            if self.calls == 5:
                act(self)
            return fakes

    more = ["run.total_samples=5120", "run.checkpoint_every_samples=512"]
    if error:
        with pytest.raises(error) as caught:
            run_late(Late, tmp_path, *more)
        assert named in str(caught.value)
    else:
        run_late(Late, tmp_path, *more)
    Checkpoints(Store(str(tmp_path)).child("checkpoints")).newest()  # raises if one is damaged


def run_late(late: type[nn.Module], tmp_path: Path, *more: str) -> None:
    settings = ['model.generator={name="late"}', "evaluate.metrics=[]", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generators._entries, "late", late)
        run(load_config("ring", settings), LocalCommunicator(CPU), Store(str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "is_users"),
    [
        ("/home/me/networks.py", True),
        ("/v/lib/python3.11/site-packages/mine/networks.py", True),
        ("/v/lib/python3.11/site-packages/safetensors/torch.py", False),
        ("/usr/lib/python3/dist-packages/torch/nn/functional.py", False),
        (os.path.join(sysconfig.get_path("stdlib"), "concurrent/futures/_base.py"), False),
        (gatdist.__file__, False),
        ("/tmp/torchinductor_me/ab/cab.py", False),
        ("<string>", False),
    ],
)
def test_failing_code_is_attributed_by_its_file(file: str, is_users: bool) -> None:
    with pytest.raises(ValueError, match="wrong") as caught:
        exec(compile("raise ValueError('wrong')", file, "exec"))  # noqa: S102  (frames of any file)
    error = caught.value
    assert error.__traceback__
    error.__traceback__ = error.__traceback__.tb_next  # without the frame of this test
    assert (users_frame(error, ["mine.networks"]) is not None) == is_users
