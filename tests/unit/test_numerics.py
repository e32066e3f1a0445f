"""How torch computes within a context, and during a run."""

import pytest
import torch

import gatdist
from gatdist.common.numerics import tf32
from gatdist.config import load_config
from gatdist.evaluation import Evaluator
from gatdist.training import loop

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
