"""What cannot keep the groups of coupled samples whole is refused by name."""

import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import load_config
from gatdist.game import require_whole_groups
from gatdist.models import register_discriminator
from gatdist.models.image.stylegan2 import StyleGAN2Discriminator
from gatdist.training.plan import check
from support import refused

RING = ["run.global_batch=16"]


def network(group=4):
    shape = {"sample_shape": (1, 8, 8), "num_classes": 0}
    return StyleGAN2Discriminator(capacity=32, minibatch_deviation=group, **shape)


CANONICAL = ["run.reduction=canonical"]


@pytest.mark.parametrize(
    ("batch", "overrides", "sizes", "subject", "hint"),
    [
        (18, [], [1], "run.global_batch", "Use 16"),
        (2, [], [1], "run.global_batch", "Use 4"),
        (24, [], [4], "cluster.workers", "--workers 3"),
        (24, ["game.generator_batch=6"], [1], "game.generator_batch", "Use 4"),
        (24, ["game.generator_batch=12"], [5, 6], "cluster.workers", "--workers 3"),
        (24, [], [4, 5, 7, 8], "cluster.workers", "--workers 6"),
        (24, [*CANONICAL, "run.virtual_workers=8"], [1], "run.virtual_workers", "Use 2"),
        (16, ["optim.generator.micro_batch=2"], [1], "optim.generator.micro_batch", "Use 4"),
        (40, ["optim.generator.micro_batch=10"], [1], "optim.generator.micro_batch", "Use 8"),
        (16, ["optim.generator.micro_batch=7"], [1], "optim.generator.micro_batch", "Use 4"),
        (24, ["optim.discriminator.micro_batch=6"], [1], "optim.discriminator.micro_batch", "4"),
    ],
)
def test_parts_that_split_groups_are_rejected_with_a_valid_value(
    batch, overrides, sizes, subject, hint
):
    config = load_config("digits", [f"run.global_batch={batch}", *overrides])
    with refused(ConfigError, subject) as caught:
        require_whole_groups(config, "discriminator", network(), sizes)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["run.global_batch=24"], [1, 2, 3, 6]),
        (["run.global_batch=24", "game.generator_batch=16"], [1, 2]),
        (["run.global_batch=16", *CANONICAL, "run.virtual_workers=4"], [1, 2, 3, 4, 5, 6, 7, 8]),
        (["run.global_batch=16", "optim.generator.micro_batch=4"], [1, 2, 4]),
    ],
)
def test_numbers_of_workers_that_cut_groups_are_omitted(overrides, sizes):
    config = load_config("digits", overrides)
    found = require_whole_groups(config, "discriminator", network(), range(1, 9))
    assert [*found] == sizes


def test_an_elastic_run_uses_the_numbers_of_workers_with_whole_groups(tmp_path):
    checked = check(settings(Judge, "cluster.workers=[3, 8]"), str(tmp_path / "run"))
    assert checked.sizes == [4, 8]
    with refused(ConfigError, "cluster.workers"):
        check(settings(Judge, "cluster.workers=[5, 7]"), str(tmp_path / "run"))


def test_group_of_one_sample_is_rejected():
    with refused(ConfigError, "model.discriminator.minibatch_deviation"):
        network(group=1)


class Judge(nn.Module):
    """Logits less the mean of each group's, grouped as a subclass says."""

    couples_samples = 2

    def __init__(self, *, sample_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, samples, labels=None):
        logits = self.layer(samples)[:, 0]
        if len(logits) % 2:
            return logits
        return self.grouped(logits)

    def grouped(self, logits):
        rows = logits.unflatten(0, (2, -1))
        return (rows - 0.5 * rows.mean(0)).flatten()


class Neighbours(Judge):
    def grouped(self, logits):
        rows = logits.unflatten(0, (-1, 2))
        return (rows - 0.5 * rows.mean(1, keepdim=True)).flatten()


def settings(kind, *overrides):
    name = f"judge_{kind.__name__.lower()}"
    register_discriminator(name)(kind)
    return load_config("ring", [f'model.discriminator={{name="{name}"}}', *RING, *overrides])


def test_groups_that_a_network_declares_can_be_split_over_workers_and_micro_batches(tmp_path):
    for overrides in (
        ["cluster.workers=4"],
        ["run.reduction=canonical", "run.virtual_workers=8", "cluster.workers=4"],
        ["optim.discriminator.micro_batch=4"],
    ):
        check(settings(Judge, *overrides), str(tmp_path / "run"))
    with refused(ConfigError, "cluster.workers"):
        check(settings(Judge, "cluster.workers=16"), str(tmp_path / "run"))
    with refused(ConfigError, "game.update_rule"):
        check(settings(Judge, "game.update_rule=one_stage"), str(tmp_path / "run"))


def test_groups_that_differ_from_those_declared_are_rejected(tmp_path):
    with refused(PluginError, "model.discriminator.name"):
        check(settings(Neighbours), str(tmp_path / "run"))


@pytest.mark.parametrize("value", [torch.tensor(2), 2.5, "2", -1])
def test_invalid_group_declaration_is_rejected(value, tmp_path):
    class Odd(Judge):
        couples_samples = value

    with refused(PluginError, "model.discriminator.name"):
        check(settings(Odd), str(tmp_path / "run"))
