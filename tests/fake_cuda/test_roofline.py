"""``gatdist train --dry-run --device cuda``: what a step costs and the least time it takes."""

import json
from collections import Counter

import budgets
import fake_cases
import pytest
import torch

from conditional_games import REUSED
from gatdist.bench.cases import steps_by_penalties
from gatdist.bench.roofline import GPUS, Bound, Gpu, _on_one_worker, bound, estimate
from gatdist.bench.step_costs import CPU, Costs, step_costs
from gatdist.cli import main
from gatdist.common.errors import PluginError
from gatdist.config import import_plugins, load_config
from gatdist.game.augmentation import filters

BUDGETS = budgets.load()
GPU = Gpu("GPU", 1e9, 1e9, float32=1e9, tf32=2e9, float16=8e9, bfloat16=4e9)


@pytest.mark.parametrize(
    "name",
    [
        *("preset/digits", "preset/glyphs-stylegan2", "preset/speech", "preset/words"),
        *("rule/alternating-bfloat16", "rule/one_stage-float32", "rule/alternating-float16"),
    ],
)
def test_counts_on_the_cpu_are_those_of_fake_gpus(name):
    case = fake_cases.CASES[name]()
    budget = BUDGETS[name]["due"]
    found = step_costs(
        case.config, case.shape, case.classes, case.metadata, fake_cases.steps(case.config)
    )["due"].table()
    for key, tolerance in {"tflop": 0.01, "operators": 0.08, "gib": 0.25, "peak_gib": 0.2}.items():
        assert found[key] == pytest.approx(budget[key], rel=tolerance), key
    assert found["by_kernel"] == budget["by_kernel"]
    assert found["map_kernels"] == found["host_reads"] == 0


def costs(*kernels):
    return Costs(kernels=Counter(kernels))


@pytest.mark.parametrize(
    ("dtype", "tf32", "seconds"),
    [
        (torch.float32, False, 8.0),
        (torch.float32, True, 4.0),
        (torch.bfloat16, True, 2.0),
        (torch.float16, False, 1.0),
    ],
)
def test_an_operator_takes_as_long_as_its_products(dtype, tf32, seconds):
    found = bound(costs((dtype, 8 * 10**9, 10**8)), GPU, tf32=tf32)
    assert found == Bound(pytest.approx(seconds), 0.0)


def test_an_operator_takes_as_long_as_its_bytes():
    small = (torch.float32, 10**9, 3 * 10**9), (torch.float32, 0, 10**9)
    assert bound(costs(*small, small[1]), GPU, tf32=False) == Bound(5.0, 5.0)


def test_gpus_without_the_format_have_no_bound():
    t4 = next(gpu for gpu in GPUS if gpu.name == "T4")
    assert bound(costs((torch.bfloat16, 1, 1)), t4, tf32=False) is None
    assert bound(costs((torch.float32, 1, 1)), t4, tf32=True) is not None


def test_steps_by_penalties():
    penalties = [
        "game.penalties.r1={strength=1, every_steps=16}",
        "game.penalties.path_length={strength=1, every_steps=4}",
    ]
    found = steps_by_penalties(load_config("digits", ["game.penalties={}", *penalties]))
    due = {frozenset(filter(None, name.split(", "))): share for name, (_, share) in found.items()}
    assert due == {
        frozenset(): 3 / 4,
        frozenset({"path_length"}): 3 / 16,
        frozenset({"r1", "path_length"}): 1 / 16,
    }


def test_without_penalties_all_steps_are_equal():
    found = steps_by_penalties(load_config("digits", ["game.penalties={}"]))
    assert [share for _, share in found.values()] == [1]


def test_workers_share_the_batch():
    one, two = (
        estimate(load_config("digits", [f"cluster.workers={n}", "run.reduction='canonical'"]))
        for n in (1, 2)
    )
    assert (one["batch"], two["batch"]) == (64, 32)
    assert two["steps"][0]["tflop"] == pytest.approx(one["steps"][0]["tflop"] / 2, rel=0.01)


def test_command(capsys):
    assert main(["train", "digits", "--dry-run", "--device", "cuda", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out)["gpu"]
    assert sum(step["share"] for step in gpu["steps"]) == 1
    assert all(row["fits"] and row["step_s"] > 0 for row in gpu["gpus"])
    speeds = {row["name"]: row["samples_per_s"] for row in gpu["gpus"]}
    assert speeds["H100 SXM"] > speeds["A100 SXM"] > speeds["T4"]


def test_device_needs_a_dry_run(capsys):
    assert main(["train", "digits", "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err


PLUGIN = """
import torch
from gatdist import register_discriminator
from torch import nn
from torch.nn import functional

class Network(nn.Module):
    def __init__(self, *, sample_shape, num_classes):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)
        self.make()

    def make(self):
        pass

    def forward(self, x, labels=None):
        return self.last(self.middle(self.first(x.flatten(1)), x))[:, 0]

@register_discriminator("batch_norm")
class BatchNorm(Network):
    def make(self):
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
        self.norm = nn.BatchNorm1d(64)

    def middle(self, h, x):
        return self.norm(self.layer(h))

@register_discriminator("constants")
class Constants(Network):
    def make(self):
        self.shift, self.several = torch.ones(64), [{"scale": torch.ones(64)}]
        self.made_later = None

    def middle(self, h, x):
        if self.made_later is None:
            self.made_later = torch.arange(64, device=h.device)
        return h * self.several[0]["scale"].to(h) + self.shift.to(h) + self.made_later.to(h)

@register_discriminator("recurrent")
class Recurrent(Network):
    def make(self):
        self.layer = nn.GRU(16, 16, batch_first=True)

    def middle(self, h, x):
        return self.layer(h.view(-1, 4, 16))[0].flatten(1)

@register_discriminator("attention")
class Attention(Network):
    def middle(self, h, x):
        h = h.view(-1, 1, 4, 16)
        return functional.scaled_dot_product_attention(h, h, h).flatten(1)

@register_discriminator("reads_values")
class ReadsValues(Network):
    def middle(self, h, x):
        return h * float(x.detach().numpy().mean())

@register_discriminator("loops")
class Loops(Network):
    def middle(self, h, x):
        drawn = torch.rand(len(h))
        while (drawn > 0.5).any():
            drawn = torch.rand(len(h))
        return h
"""


@pytest.fixture
def of_plugin(tmp_path, monkeypatch):
    """Return the costs with a discriminator of the plugin."""
    (tmp_path / "some_networks.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)

    def costs_of(name):
        network = "model.discriminator={name='" + name + "'}"
        config = load_config("digits", ["plugins=['some_networks']", network, "game.penalties={}"])
        import_plugins(config.plugins)
        return estimate(config)

    return costs_of


@pytest.mark.parametrize("name", ["batch_norm", "constants", "recurrent"])
def test_users_networks_are_examined_with_values(of_plugin, name):
    assert of_plugin(name)["steps"][0]["operators"] > 100


def test_attention_is_counted(of_plugin):
    (attention,), (plain,) = (of_plugin(name)["steps"] for name in ("attention", "constants"))
    assert attention["tflop"] > plain["tflop"]


@pytest.mark.parametrize("name", ["reads_values", "loops"])
def test_networks_that_need_values_are_named(of_plugin, name):
    with pytest.raises(PluginError) as caught:
        of_plugin(name)
    assert (caught.value.subject, name in str(caught.value.value)) == ("model", True)


def test_the_process_is_left_as_it_was():
    filtered = "game.augmentation={name='ada', policy=['filter'], initial_p=0.5}"
    before = torch.get_rng_state()
    estimate(load_config("digits", [filtered]))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(filters.on(CPU, torch.float32, filters.bands, 8)) is torch.Tensor


@pytest.mark.parametrize("overrides", [REUSED, ["game.update_rule=simultaneous"]])
def test_a_worker_alone_keeps_the_batch_of_the_generator_unset(overrides):
    config = load_config("digits", overrides)
    alone = _on_one_worker(config, 2)
    assert alone.run.global_batch == config.run.global_batch // 2
    assert alone.game.generator_batch is None


def test_a_worker_alone_gets_its_share_of_the_batch_of_the_generator():
    config = load_config("digits", ["game.generator_batch=32"])
    assert _on_one_worker(config, 2).game.generator_batch == 16
