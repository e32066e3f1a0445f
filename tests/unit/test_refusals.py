"""Invalid or inexact combinations are rejected at start, by name, with a hint."""

import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import load_config
from gatdist.models import register_discriminator
from gatdist.training.plan import check
from support import refused

RING = ["game.penalties={}"]
SGD = ["optim.generator.name=sgd", "optim.discriminator.name=sgd"]


class Normalized(nn.Module):
    def __init__(self, sample_shape):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(sample_shape[0], 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )

    def forward(self, samples, labels=None):
        return self.layers(samples)[:, 0]


class Patches(nn.Linear):
    def __init__(self, sample_shape):
        super().__init__(sample_shape[0], 3)

    def forward(self, samples, labels=None):
        return super().forward(samples)


class TakesTokens(nn.Module):
    """Rounds its input to ids, like a network for text."""

    def __init__(self, sample_shape):
        super().__init__()
        self.embedding = nn.Embedding(16, 1)

    def forward(self, samples, labels=None):
        return self.embedding(samples.long().clamp(0, 15)).sum((1, 2))


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x


class NotTwice(nn.Linear):
    def __init__(self, sample_shape):
        super().__init__(sample_shape[0], 1)

    def forward(self, samples, labels=None):
        return OnlyOnce.apply(super().forward(samples)).tanh()[:, 0]


@pytest.fixture(autouse=True)
def own_networks():
    for kind in (Normalized, Patches, TakesTokens, NotTwice):
        register_discriminator(kind.__name__)(
            lambda *, sample_shape, num_classes, kind=kind: kind(sample_shape)
        )


def with_network(name):
    return f'model.discriminator={{name="{name}"}}'


CASES = {
    "one stage, hinge": (
        [*RING, "game.update_rule=one_stage", "game.loss=hinge"],
        ["game.loss = 'hinge'", "one_stage", "simultaneous", "nonsaturating"],
    ),
    "one stage, batch norm": (
        [*RING, "game.update_rule=one_stage", with_network("Normalized")],
        ["game.update_rule = 'one_stage'", "'layers.1' (BatchNorm1d)", "simultaneous"],
    ),
    "several logits": (
        [*RING, "game.update_rule=one_stage", with_network("Patches")],
        ["model.discriminator.name = 'Patches'", "(2, 3)"],
    ),
    "one stage, several steps": (
        [*RING, "game.update_rule=one_stage", "game.num_discriminator_steps=2"],
        ["game.num_discriminator_steps = 2", "'one_stage'", "alternating"],
    ),
    "one stage, another generator batch": (
        [*RING, "game.update_rule=one_stage", "game.generator_batch=16"],
        ["game.generator_batch = 16", "'one_stage'", "alternating"],
    ),
    "generator batch above a step's samples": (
        ["run.global_batch=64", "game.num_discriminator_steps=2", "game.generator_batch=129"],
        ["game.generator_batch = 129", "128"],
    ),
    "generator batch that workers can't share": (
        ["game.generator_batch=3", "cluster.workers=4"],
        ["game.generator_batch = 3", "4 workers"],
    ),
    "generator batch that virtual workers can't share": (
        ["run.reduction=canonical", "game.generator_batch=30"],
        ["game.generator_batch = 30", "run.virtual_workers (4)"],
    ),
    "decay rates that change, recorded": (
        [
            "precision.cuda_graphs=true",
            "optim.generator.betas=[0.0, {start=0.9, end=0.99, samples=9}]",
        ],
        ["optim.generator.betas", "precision.cuda_graphs"],
    ),
    "canonical, more workers than virtual workers": (
        ["run.reduction=canonical", "run.virtual_workers=2", "cluster.workers=4"],
        ["cluster.workers = 4", "run.virtual_workers (2)", "--workers 2"],
    ),
    "virtual workers, no power of two": (
        ["run.reduction=canonical", "run.virtual_workers=6"],
        ["run.virtual_workers = 6", " 4"],
    ),
    "virtual workers that do not divide the batch": (
        ["run.reduction=canonical", "run.virtual_workers=8", "run.global_batch=36"],
        ["run.virtual_workers = 8", "run.global_batch (36)", " 4"],
    ),
    "canonical, micro-batches": (
        ["run.reduction=canonical", "optim.generator.micro_batch=8"],
        ["optim.generator.micro_batch = 8", "canonical"],
    ),
    "canonical, compressed": (
        ["run.reduction=canonical", "precision.reduce_dtype=bfloat16"],
        ["precision.reduce_dtype = 'bfloat16'", "canonical"],
    ),
    "second order without second derivatives": (
        [*RING, "game.update_rule=consensus", "game.loss=minimax", with_network("NotTwice")],
        ["game.update_rule = 'consensus'", "once_differentiable", "extragradient"],
    ),
    "penalty without second derivatives": (
        ["game.penalties={r1={strength=1.0}}", with_network("NotTwice")],
        ["game.penalties.r1", "once_differentiable"],
    ),
    "second order, compiled": (
        [*RING, "game.update_rule=consensus", 'precision.compile=["generator"]'],
        ["precision.compile = 'generator'", "'consensus'"],
    ),
    "penalty, compiled": (
        ["game.penalties={r1={strength=1.0}}", 'precision.compile=["discriminator"]'],
        ["precision.compile = 'discriminator'", "'r1'"],
    ),
    "second order, float16": (
        [*RING, "game.update_rule=consensus", "precision.dtype=float16"],
        ["precision.dtype = 'float16'", "bfloat16"],
    ),
    "penalty on token ids": (
        ["game.penalties={r1={strength=1.0}}", with_network("TakesTokens")],
        ["game.penalties.r1", "RuntimeError"],
    ),
    "competitive, not zero-sum": (
        [*RING, "game.update_rule=competitive", "game.loss=nonsaturating", *SGD],
        ["game.loss = 'nonsaturating'", "minimax", "wasserstein"],
    ),
    "competitive, Adam": (
        [*RING, "game.update_rule=competitive", "game.loss=minimax"],
        ["optim.generator.name = 'adam'", "'competitive'", "'sgd'"],
    ),
    "conjugate, momentum": (
        [*RING, "game.update_rule=conjugate", *SGD, "optim.discriminator.momentum=0.9"],
        ["optim.discriminator.momentum = 0.9", " 0."],
    ),
    "unknown rule": (["game.update_rule=altrenating"], ["game.update_rule", "alternating"]),
    "unknown loss": (["game.loss=hing"], ["game.loss = 'hing'", "hinge"]),
    "unknown penalty": (["game.penalties={r3={strength=1.0}}"], ["game.penalties = 'r3'"]),
    "unknown augmentation": (
        ['game.augmentation={name="adda"}'],
        ["game.augmentation.name = 'adda'", "ada"],
    ),
    "augmented points": (
        ['game.augmentation={name="ada"}'],
        ["game.augmentation = 'ada'", "(2,)"],
    ),
    "unknown option of a rule": (
        [*RING, "game.update_rule=consensus", "game.rule_options={strenght=1.0}"],
        ["game.rule_options.strenght", "strength"],
    ),
    "option of a rule without options": (
        [*RING, "game.rule_options={strength=1.0}"],
        ["game.rule_options.strength"],
    ),
    "bad option of a rule": (
        [*RING, "game.update_rule=consensus", "game.rule_options={strength=-1.0}"],
        ["game.rule_options.strength = -1.0"],
    ),
    "batch norm in micro-batches": (
        [*RING, with_network("Normalized"), "optim.discriminator.micro_batch=8"],
        ["model.discriminator.name", "BatchNorm1d", "micro_batch"],
    ),
    "batch norm on two workers": (
        [*RING, with_network("Normalized"), "cluster.workers=2"],
        ["model.discriminator.name", "BatchNorm1d", "2 workers", "--workers 1"],
    ),
    "batch norm under canonical reduction": (
        [*RING, with_network("Normalized"), "run.reduction=canonical"],
        ["model.discriminator.name", "BatchNorm1d", "canonical"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_combination_is_rejected_by_name_with_a_hint(case, tmp_path):
    overrides, (field, *metadata) = CASES[case]
    with pytest.raises((ConfigError, PluginError)) as caught:
        check(load_config("ring", ["evaluate.metrics=[]", *overrides]), str(tmp_path / "run"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(field)
    for fact in metadata:
        assert fact in message, message
    assert not (tmp_path / "run").exists()


def test_failing_network_is_reported_with_its_location_before_a_worker_starts(tmp_path):
    class Fails(nn.Linear):
        def forward(self, samples, labels=None):
            raise ValueError("no such thing")

    register_discriminator("Fails")(lambda *, sample_shape, num_classes: Fails(2, 1))
    with refused(PluginError, "model.discriminator.name") as found:
        check(load_config("ring", [*RING, with_network("Fails")]), str(tmp_path / "run"))
    for fact in ("ValueError: no such thing", "test_refusals.py:", "raise ValueError"):
        assert fact in str(found.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*RING, with_network("Normalized")],
        [*RING, "game.update_rule=one_stage", "game.loss=least_squares"],
        [*RING, "game.update_rule=competitive", "game.loss=wasserstein", *SGD],
        ["game.penalties={r1={strength=1.0}}", 'precision.compile=["generator"]'],
        ["game.penalties={lecam={strength=1.0}}", 'precision.compile=["discriminator"]'],
        ["game.penalties={path_length={strength=1.0}}"],
        ["run.reduction=canonical", "cluster.workers=4"],
    ],
)
def test_valid_combination_is_accepted(overrides, tmp_path):
    check(load_config("ring", ["evaluate.metrics=[]", *overrides]), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["game.update_rule=one_stage"], "game.update_rule"),
        (["game.latents=fresh"], "game.latents"),
        (["game.order=generator_first"], "game.order"),
        (["game.num_discriminator_steps=2"], "game.num_discriminator_steps"),
        (["optim.generator.micro_batch=4"], "optim.generator.micro_batch"),
    ],
)
def test_fakes_are_only_reused_if_both_phases_use_the_same(overrides, field, tmp_path):
    settings = ["game.latents=shared", "game.reuse_fakes=true", "evaluate.metrics=[]", *overrides]
    with refused(ConfigError, field) as caught:
        check(load_config("ring", settings), str(tmp_path / "run"))
    assert "game.reuse_fakes" in str(caught.value)
