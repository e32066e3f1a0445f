"""WaveGAN equals the operators of its code: TensorFlow's "SAME" padding, Glorot weights."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.config import parse_config
from gatdist.game.latents import Latents
from gatdist.models import build_networks
from gatdist.models.audio import WaveGANDiscriminator, WaveGANGenerator, shift
from gatdist.parallel import draws
from gatdist.runs import Sampler
from support import refused


def networks(length, width=2, latent_size=5, channels=1):
    shape = (channels, length)
    generator = WaveGANGenerator(
        latent_size=latent_size, sample_shape=shape, num_classes=0, width=width
    )
    return generator, WaveGANDiscriminator(sample_shape=shape, num_classes=0, width=width)


def perturbed(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return network.double()


def same_convolution(x, weight, bias, stride):
    """TensorFlow's definition: ⌈length/stride⌉ outputs, the odd zero of the padding on the right.

    x [n, c, t], weight [o, c, k].
    """
    length, taps = x.shape[2], weight.shape[2]
    outputs = -(-length // stride)
    left = max((outputs - 1) * stride + taps - length, 0) // 2
    out = np.zeros((len(x), len(weight), outputs)) + bias[:, None]
    for i in range(outputs):
        for k in range(taps):
            source = i * stride + k - left
            if 0 <= source < length:
                out[:, :, i] += x[:, :, source] @ weight[:, :, k].T
    return out


def same_transposed_convolution(x, weight, bias, stride):
    """The gradient of :func:`same_convolution` by its input, of ``stride`` times the length.

    x [n, c, t], weight [c, o, k].
    """
    length, taps = x.shape[2] * stride, weight.shape[2]
    left = max((x.shape[2] - 1) * stride + taps - length, 0) // 2
    out = np.zeros((len(x), weight.shape[1], length)) + bias[:, None]
    for i in range(x.shape[2]):
        for k in range(taps):
            target = i * stride + k - left
            if 0 <= target < length:
                out[:, :, target] += x[:, :, i] @ weight[:, :, k]
    return out


STRIDES = {64: [4], 128: [4, 2], 256: [4, 4], 512: [4, 4, 2]}


@pytest.mark.parametrize("length", STRIDES)
def test_wavegan_generator_equals_the_published_one(length):
    generator = perturbed(networks(length, channels=2)[0])
    z = np.random.default_rng(0).uniform(-1, 1, (3, 5))
    w = {name: t.numpy() for name, t in generator.state_dict().items()}
    x = (z @ w["start.weight"].T + w["start.bias"]).reshape(3, -1, 16)
    for level, stride in enumerate(STRIDES[length]):
        weight, bias = w[f"layers.{level}.weight"], w[f"layers.{level}.bias"]
        x = same_transposed_convolution(np.maximum(x, 0), weight, bias, stride)
    with torch.no_grad():
        found = generator(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(found, np.tanh(x), rtol=1e-10, atol=1e-10)


def phase_shuffled(x, phase):
    """The published shuffle of one clip [c, t]: pad by reflection on one side, then cut."""
    padded = np.pad(x, ((0, 0), (max(phase, 0), max(-phase, 0))), mode="reflect")
    return padded[:, max(-phase, 0) : max(-phase, 0) + x.shape[1]]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("length", STRIDES)
def test_wavegan_discriminator_equals_the_published_one(length, shuffled):
    discriminator = perturbed(networks(length, channels=2)[1])
    x = np.random.default_rng(0).normal(size=(3, 2, length))
    clips, noise = torch.from_numpy(x), torch.randn(3, discriminator.noise_size).double()
    w = {name: t.numpy() for name, t in discriminator.state_dict().items()}
    strides = STRIDES[length]
    for level, stride in enumerate(strides):
        x = same_convolution(x, w[f"layers.{level}.weight"], w[f"layers.{level}.bias"], stride)
        x = np.maximum(0.2 * x, x)
        if shuffled and level < len(strides) - 1:
            phases = [math.floor(5 * NORMAL.cdf(float(v))) - 2 for v in noise[:, level]]
            x = np.stack([phase_shuffled(clip, p) for clip, p in zip(x, phases, strict=True)])
    expected = x.reshape(3, -1) @ w["finish.weight"][0] + w["finish.bias"]
    with torch.no_grad():
        found = discriminator(clips, None, noise if shuffled else None).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


class NORMAL:
    @staticmethod
    def cdf(value):
        return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize("phase", [-3, -1, 0, 2])
def test_a_shift_reflects_at_the_ends_as_published(phase):
    x = torch.arange(12.0).reshape(2, 1, 6) ** 2
    found = shift(x, torch.tensor([phase, -phase]), 3)
    expected = [phase_shuffled(x[0].numpy(), phase), phase_shuffled(x[1].numpy(), -phase)]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_padding_of_the_published_kernel_is_ten_and_eleven_zeros():
    """A one in the last tap and the first: outputs begin at −10 and end 11 behind the last."""
    layer = nn.Conv1d(1, 1, 25, 4)
    x = np.arange(1.0, 65).reshape(1, 1, 64)
    first, last = np.zeros((2, 1, 1, 25))
    first[0, 0, 0], last[0, 0, 24] = 1, 1
    bias = np.zeros(1)
    assert layer.kernel_size == (25,)
    np.testing.assert_array_equal(same_convolution(x, first, bias, 4)[0, 0, :4], [0, 0, 0, 3])
    assert same_convolution(x, last, bias, 4)[0, 0, 0] == 15


@pytest.mark.parametrize("player", [0, 1])
def test_wavegan_starts_from_glorot_uniform_weights_and_zero_biases(player):
    torch.manual_seed(0)
    network = networks(4096, 16, 100)[player]
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Linear)):
            weight = module.weight.detach()
            fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
            bound = math.sqrt(6 / fans)
            assert float(weight.abs().max()) <= bound
            spread = float(weight.std()) / (bound / math.sqrt(3))
            assert spread == pytest.approx(1, abs=4 / math.sqrt(weight.numel()))
            assert not module.bias.any()


def test_wavegans_first_outputs_have_the_published_spread():
    """Before training, over seeds: single networks have 6e-4 to 9.5e-4.

    Expected from the variances of Glorot weights, 2 / (fans), and the taps that reach an output.
    """
    channels = [1024, 512, 256, 128, 64, 1]
    square = np.full(16, 100 / 3 * 2 / (100 + 1024 * 16))
    for before, after in pairwise(channels):
        ones = np.ones((1, 1, 25))
        variance = 2 / (25 * (before + after))
        taps = same_transposed_convolution(square[None, None] / 2, ones, np.zeros(1), 4)
        square = before * variance * taps[0, 0]
    expected = float(np.sqrt(square.mean()))
    assert expected == pytest.approx(8.3e-4, rel=0.03)
    torch.manual_seed(0)
    squares = []
    for _ in range(8):
        generator, _ = networks(16384, 64, 100)
        with torch.no_grad():
            squares.append(generator(2 * torch.rand(4, 100) - 1).square().mean())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (16384, (19_065_345, 17_427_969)),
        (32768, (73_149_953, 69_875_201)),
        (65536, (73_149_953, 69_875_201)),
    ],
)
def test_wavegan_has_as_many_parameters_as_the_published_lengths(length, expected):
    with torch.device("meta"):
        found = networks(length, 64, 100)
    assert tuple(sum(p.numel() for p in n.parameters()) for n in found) == expected


def test_phase_shuffle_is_shorter_than_the_shortest_map():
    shape = (1, 128)  # the map before the last layer has 32 samples
    with refused(ConfigError, "model.discriminator.phase_shuffle"):
        WaveGANDiscriminator(sample_shape=shape, num_classes=0, phase_shuffle=32)
    discriminator = WaveGANDiscriminator(
        sample_shape=shape, num_classes=0, width=2, phase_shuffle=31
    )
    noise = torch.randn(64, discriminator.noise_size) * 3
    assert discriminator(torch.randn(64, 1, 128), None, noise).isfinite().all()


# Latents


class Identity(nn.Module):
    """A generator whose samples are its latents."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, latents, labels):
        return latents * self.one


def sampled(distribution, num=4000, **options):
    sampler = Sampler(Identity(), 4, 0, 3, "sample", distribution=distribution, **options)
    return sampler(torch.arange(num)).flatten().sort().values


def test_uniform_latents_are_uniform_between_minus_one_and_one():
    found = sampled("uniform")
    expected = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    assert float(found.abs().max()) < 1
    # Kolmogorov–Smirnov at one in a million, over a range of 2.
    assert float((found - expected).abs().max()) < 2 * 2.7 / math.sqrt(len(found))
    assert not torch.equal(found, sampled("normal"))


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_latents_in_training_and_in_samples_are_the_same_function_of_position(distribution):
    positions = torch.tensor([5, 2, 9])
    sampler = Sampler(Identity(), 4, 0, 3, "sample", distribution=distribution)
    drawn = Latents(3, 4, distribution=distribution)(positions, "sample", torch.float64)
    torch.testing.assert_close(sampler(positions), drawn, rtol=0, atol=0)
    several = Latents(3, 4, 8, distribution)
    for step in (0, 1, 5, 40):
        positions = torch.arange(8) + 8 * step
        drawn = several(positions, "latents", torch.float64)
        for part in (slice(0, 4), slice(4, 8)):
            alone = Latents(3, 4, 8, distribution)(positions[part], "latents", torch.float64)
            assert torch.equal(drawn[part], alone)


def test_truncation_narrows_uniform_latents():
    narrow = sampled("uniform", truncation=0.5)
    assert float(narrow.abs().max()) <= math.erf(0.5 / math.sqrt(2))
    assert float(narrow.abs().max()) > 0.9 * math.erf(0.5 / math.sqrt(2))


def test_interpolation_of_uniform_latents_stays_in_their_range_and_meets_its_ends():
    sampler = Sampler(Identity(), 64, 0, 3, "sample", distribution="uniform")
    shares = torch.linspace(0, 1, 9, dtype=torch.float64)
    between = sampler.between(0, 1, shares)
    torch.testing.assert_close(between[[0, -1]], sampler(torch.tensor([0, 1])))
    assert float(between.abs().max()) < 1
    # Uniform all the way: the standard deviation does not shrink in the middle.
    assert float(between[4].std()) == pytest.approx(1 / math.sqrt(3), rel=0.2)


def test_the_configured_distribution_reaches_the_game():
    from gatdist.game import Game
    from gatdist.parallel.batch import Batch

    config = parse_config(
        {
            "run": {"total_samples": 64, "seed": 4},
            "data": {"url": "builtin:ring"},
            "model": {
                "generator": {"name": "mlp"},
                "discriminator": {"name": "mlp"},
                "latent_distribution": "uniform",
            },
        }
    )
    built = build_networks(config, (2,), 0)
    game = Game.from_config(config, *built, (2,))
    positions = torch.arange(16)
    batch = Batch(torch.zeros(16, 2), None, positions, 0, 16)
    normal = draws.normal(4, "latents", positions, (config.model.latent_size,))
    expected = 2 * torch.special.ndtr(normal.double()) - 1
    torch.testing.assert_close(game.latents(batch).double(), expected, rtol=0, atol=1e-6)
