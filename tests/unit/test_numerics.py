"""How torch computes within a context, and during a run."""

import os

import pytest
import torch
from torch import nn

import gatdist
from gatdist.common.errors import ConfigError
from gatdist.common.numerics import kernels, tf32
from gatdist.config import load_config
from gatdist.evaluation import Evaluator
from gatdist.models import discriminators
from gatdist.training import loop
from support import refused

SETTINGS = ["run.total_samples=64", "model.generator.width=4", "model.discriminator.width=4"]


def allowed():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("inside", [False, True])
def test_context_sets_tf32_and_restores_it_after_an_error(inside):
    before = allowed()

    def fail():
        with tf32(inside):
            assert allowed() == (inside, inside)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert allowed() == before


@pytest.mark.parametrize("requested", [False, True])
def test_runs_use_tf32_on_request_and_evaluations_never(requested, tmp_path, monkeypatch):
    found = {}

    def spy(place, function):
        def spied(*arguments, **options):
            found[place] = allowed()
            return function(*arguments, **options)

        return spied

    monkeypatch.setattr(Evaluator, "_sample_set", spy("evaluation", Evaluator._sample_set))
    monkeypatch.setattr(loop, "train_step", spy("training", loop.train_step))
    config = load_config("digits", [*SETTINGS, f"precision.tf32={str(requested).lower()}"])
    before = allowed()
    gatdist.train(config, str(tmp_path / "run"), local=True)
    assert found == {"training": (requested, requested), "evaluation": (False, False)}
    assert allowed() == before


def test_tf32_changes_the_result():
    assert load_config("digits", ["precision.tf32=true"]).digest() != load_config("digits").digest()


CANONICAL = [*SETTINGS, "run.reduction=canonical", "run.virtual_workers=1"]


def chosen():
    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": cudnn.deterministic,
        "benchmark": cudnn.benchmark,
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
    }


@pytest.fixture
def restored():
    """Restore torch's switches after a test that changes them as a user would."""
    before = chosen()
    yield before
    torch.use_deterministic_algorithms(before["deterministic"], warn_only=before["warn_only"])
    torch.backends.cudnn.deterministic = before["cudnn"]
    assert chosen() == before


@pytest.mark.parametrize(
    ("deterministic", "compiled"), [(False, False), (True, False), (True, True)]
)
def test_context_chooses_kernels_and_restores_them_after_an_error(deterministic, compiled):
    before = chosen()

    def fail():
        with kernels(deterministic=deterministic, compiled=compiled):
            assert chosen() == {
                "deterministic": deterministic,
                "warn_only": False,
                "cudnn": deterministic,
                "benchmark": not deterministic,
                "filled": not deterministic,
            }
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert chosen() == before


def test_deterministic_kernels_of_the_user_stay_on(restored):
    torch.use_deterministic_algorithms(True, warn_only=True)
    inside = restored | {"deterministic": True, "warn_only": True}
    with kernels(deterministic=False):
        assert chosen() == inside
    assert chosen() == inside


def recorded(tmp_path, monkeypatch, settings):
    """Train, and return the switches and variables that were on in a step."""
    found = []
    names = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")

    def spied(*arguments, step=loop.train_step, **options):
        found.append((chosen(), {name: os.environ.get(name) for name in names}))
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", spied)
    config = load_config("digits", [*settings, "evaluate.metrics=[]"])
    gatdist.train(config, str(tmp_path / "run"), local=True)
    return found[0]


@pytest.mark.parametrize("canonical", [False, True])
def test_runs_choose_kernels_by_their_reduction(canonical, tmp_path, monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    before = chosen()
    found, read = recorded(tmp_path, monkeypatch, CANONICAL if canonical else SETTINGS)
    assert (found["deterministic"], found["cudnn"]) == (canonical, canonical)
    assert found["benchmark"] != canonical
    assert read == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8" if canonical else None,
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    assert chosen() == before
    assert not read.keys() & os.environ.keys()


def test_variables_of_the_user_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    _, read = recorded(tmp_path, monkeypatch, CANONICAL)
    assert read == {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTORCH_CUDA_ALLOC_CONF": None}


def test_nondeterministic_workspace_is_refused_for_canonical_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    config = load_config("digits", CANONICAL)
    with refused(ConfigError, "CUBLAS_WORKSPACE_CONFIG"):
        gatdist.train(config, str(tmp_path / "run"), local=True)
    recorded(tmp_path / "fast", monkeypatch, SETTINGS)


class Putting(nn.Module):
    """Uses an operator that has no deterministic kernel, on CPUs either."""

    def __init__(self, *, sample_shape, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(sample_shape))

    def forward(self, samples, labels=None):
        logits = (samples * self.weight).flatten(1).sum(1)
        return logits + torch.zeros_like(logits).put_(torch.tensor([0]), torch.ones(1))


def test_nondeterministic_operator_is_refused_in_canonical_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(discriminators._entries, "putting", Putting)
    network = ["run.total_samples=64", "evaluate.metrics=[]", "game.penalties={}"]
    network.append("model.discriminator={name='putting'}")
    gatdist.train(load_config("digits", network), str(tmp_path / "fast"), local=True)
    canonical = load_config("digits", [*network, "run.reduction=canonical"])
    with refused(ConfigError, "run.reduction"):
        gatdist.train(canonical, str(tmp_path / "run"), local=True)
