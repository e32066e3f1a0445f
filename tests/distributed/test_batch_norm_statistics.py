"""Statistics of batch normalization of the averaged generator: averaged, recomputed or live."""

import copy
import shutil

import pytest
import torch
from torch import nn

import gatdist
from gatdist.common.seeding import generator_states
from gatdist.config import load_config
from gatdist.models.buffers import batch_norms, running_statistics
from gatdist.models.image.sngan import SNGANGenerator
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler, load_run
from gatdist.storage import Store
from gatdist.training.batch_norm import NUM_BATCHES, recompute
from gatdist.training.player import MovingAverage
from support import spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
CLASSES, BATCH = 3, 8


def generator(dtype=torch.float64):
    torch.manual_seed(5)
    network = SNGANGenerator(latent_size=6, sample_shape=(1, 16, 16), num_classes=CLASSES, width=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.to(dtype).eval().requires_grad_(False)


def sampler_of(network):
    return Sampler(network, 6, CLASSES, 11, "batch_norm")


def statistics(network):
    return [t.clone() for norm in batch_norms(network) for t in running_statistics(norm)]


def test_recomputed_statistics_are_torchs_cumulative_average_in_training_mode():
    """BigGAN's standing statistics: forwards in training mode, each batch with equal weight."""
    network = generator()
    expected = copy.deepcopy(network).train()
    for norm in batch_norms(expected):
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    sampler = sampler_of(network)
    for number in range(NUM_BATCHES):
        latents, labels, _ = sampler.inputs(torch.arange(number * BATCH, (number + 1) * BATCH))
        expected(latents, labels)
    recompute(sampler, BATCH, LOCAL)
    for mine, theirs in zip(statistics(network), statistics(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_recomputing_changes_nothing_else():
    network = generator()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    buffers = [id(tensor) for tensor in network.buffers()]
    states = generator_states(torch.device("cpu"))
    recompute(sampler_of(network), BATCH, LOCAL)
    assert generator_states(torch.device("cpu")) == states
    assert [id(tensor) for tensor in network.buffers()] == buffers  # CUDA graphs keep addresses
    assert not network.training
    for name, tensor in network.state_dict().items():
        is_statistic = name.endswith(("running_mean", "running_var"))
        assert torch.equal(tensor, before[name]) != is_statistic
    again = statistics(network)
    recompute(sampler_of(network), BATCH, LOCAL)
    assert all(map(torch.equal, statistics(network), again))


def test_batches_are_no_larger_than_the_global_batch_nor_than_256_samples():
    sizes = []
    network = generator(torch.float32)
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    recompute(sampler_of(network), 12, LOCAL)
    recompute(sampler_of(network), 1000, LOCAL)
    assert sizes == [12] * NUM_BATCHES + [256] * NUM_BATCHES


class Unused(nn.Module):
    """One norm that no forward uses, one that is used twice."""

    def __init__(self):
        super().__init__()
        self.unused, self.twice = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.without = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, latents, labels):
        return self.twice(2 * self.twice(self.without(latents)) + 1)


def test_a_norm_that_is_unused_keeps_its_statistics_and_one_used_twice_averages_both():
    network = Unused().eval().requires_grad_(False)
    network.unused.running_mean += 3
    recompute(sampler_of(network), 64, LOCAL)
    assert torch.equal(network.unused.running_mean, torch.full((6,), 3.0))
    torch.testing.assert_close(network.twice.running_mean, torch.full((6,), 0.5), rtol=0, atol=1e-4)
    # Normalized by its biased variance; then 1 and 4 times that.
    expected = torch.full((6,), 2.5 * 64 / 63)
    torch.testing.assert_close(network.twice.running_var, expected, rtol=1e-3, atol=0)


def _recomputed(comm):
    # As on several GPUs. In training mode it would communicate, which CPUs refuse.
    network = nn.SyncBatchNorm.convert_sync_batchnorm(generator(torch.float32))
    recompute(sampler_of(network), BATCH, comm)
    return statistics(network)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_recomputed_statistics_are_the_same_bits_on_any_number_of_workers(workers):
    (alone,) = spawn(1, _recomputed)
    for found in spawn(workers, _recomputed):
        assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("kind", ["averaged", "recomputed", "live"])
def test_the_average_treats_running_statistics_as_configured(kind):
    live = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    live.register_buffer("other", torch.zeros(2))
    average = MovingAverage(live, kind)
    start = copy.deepcopy(live.state_dict())
    with torch.no_grad():
        for tensor in live.state_dict().values():
            tensor.add_(4)
    average.update(live, 0.5)
    for name, tensor in average.network.state_dict().items():
        share = {"averaged": 0.5, "recomputed": 0.0, "live": 1.0}[kind]
        if name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            share = 0.5
        elif name in ("other", "1.num_batches_tracked"):
            share = 1.0
        torch.testing.assert_close(tensor, start[name] + torch.tensor(4 * share).to(tensor.dtype))


def trained(folder, kind):
    small = 'name="dcgan", width=2, normalization="batch"'
    settings = [
        "run.total_samples=192",
        "run.global_batch=16",
        "run.log_every_samples=64",
        "run.checkpoint_every_samples=64",
        f"model.generator={{{small}}}",
        'model.discriminator={name="dcgan", width=2}',
        "model.latent_size=6",
        "data.resolution=16",
        f"game.ema_batch_norm={kind}",
        "evaluate.metrics=[]",
        "evaluate.every_samples=0",
    ]
    gatdist.train(load_config("digits", settings), str(folder), local=True)
    return load_run(Store(str(folder)), torch.device("cpu"))


def test_a_run_saves_what_recomputing_from_its_averaged_weights_gives(tmp_path):
    run = trained(tmp_path / "a", "recomputed")
    saved = statistics(run.generator)
    for tensor in (t for norm in batch_norms(run.generator) for t in running_statistics(norm)):
        tensor.zero_()
    recompute(run.sampler(run.config.run.seed, "batch_norm"), 16, LOCAL)
    for found, expected in zip(statistics(run.generator), saved, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["averaged", "recomputed"])
def test_a_resumed_run_has_the_statistics_of_an_uninterrupted_one(kind, tmp_path):
    whole = trained(tmp_path / "whole", kind)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    newest = max((tmp_path / "resumed" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    resumed = trained(tmp_path / "resumed", kind)
    assert len((tmp_path / "resumed" / "attempts.jsonl").read_text().splitlines()) > 1
    for found, expected in zip(
        statistics(resumed.generator), statistics(whole.generator), strict=True
    ):
        assert torch.equal(found, expected)


def test_the_kind_of_statistics_does_not_affect_training(tmp_path):
    """Only what is evaluated and shown."""
    runs = {kind: trained(tmp_path / kind, kind) for kind in ("averaged", "recomputed", "live")}
    weights = [dict(run.checkpoint.tensors) for run in runs.values()]
    for name, tensor in weights[0].items():
        if "running_" not in name or not name.startswith("average/"):
            for other in weights[1:]:
                assert torch.equal(other[name], tensor), name
    found = [statistics(run.generator) for run in runs.values()]
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[1][0], found[2][0])
